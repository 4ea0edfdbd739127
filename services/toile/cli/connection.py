"""Where the services are: in the settings, or in the state of the platform on this machine."""

from toile.cli.errors import NoPlatformError
from toile.core.settings import Settings

_SERVICE_ADDRESSES = (
    "dataset_address",
    "train_address",
    "generate_address",
    "rank_address",
    "refine_address",
)


def is_complete(settings: Settings) -> bool:
    """Say whether the settings alone give the addresses of all services."""
    return all(getattr(settings, name) for name in _SERVICE_ADDRESSES)


def discover(settings: Settings) -> Settings:
    """Return the settings with the addresses of all services.

    Addresses that are set win. The rest comes from the platform that runs under `TOILE_HOME`.

    Raises:
        NoPlatformError: Addresses are missing and no platform is running.
    """
    from toile.cli.platform.state import PartStatus, running_state

    if is_complete(settings):
        return settings
    state = running_state(settings)
    if state is None:
        raise NoPlatformError("no platform is running; start one with: toile up")
    if state.status is not PartStatus.READY:
        raise NoPlatformError(
            f"the platform is {state.status.value}, not ready; wait for it with: toile up"
        )
    known = {n: a for n, a in state.addresses.items() if not getattr(settings, n, "")}
    return settings.model_copy(update=known)
