"""A store that does not answer for a moment, waited for where somebody waits for the result."""

from pathlib import Path

import tenacity

from toile.core.artifacts.cache import fetch
from toile.core.artifacts.store import ArtifactStore
from toile.core.errors import StoreUnavailableError

PATIENCE_SECONDS = 20.0
LONGEST_PAUSE_SECONDS = 2.0


def fetch_patiently(store: ArtifactStore, prefix: str, cache: Path) -> Path:
    """Fetch like `fetch`; again, as long as the store may come back.

    Raises:
        StoreUnavailableError: It stayed away for `PATIENCE_SECONDS`.
        ToileError: See `fetch`.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_come_back),
        wait=tenacity.wait_random_exponential(0.2, LONGEST_PAUSE_SECONDS),
        stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    return retrying(fetch, store, prefix, cache)


def may_come_back(error: BaseException) -> bool:
    """Say whether what a store was asked for may be had in a moment.

    What is missing or damaged stays so, and so do credentials that are refused.
    """
    return (
        isinstance(error, StoreUnavailableError)
        and error.reason == StoreUnavailableError.default_reason
    )
