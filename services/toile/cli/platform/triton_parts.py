"""The model plane of one machine: the Triton server, and the task that gives it its engines."""

import sys
from collections.abc import Mapping
from pathlib import Path

from toile.cli.platform.parts import Part
from toile.cli.platform.probes import triton_ready
from toile.cli.platform.state import MARK
from toile.core.settings import Settings
from toile.diffusion.triton import server
from toile.diffusion.triton.server import TritonEnvironment, TritonPorts

PORT_NAMES = ("triton_http", "triton_metrics")


def open_environment(settings: Settings) -> TritonEnvironment:
    """Return the environment that holds the server.

    Raises:
        FailedPreconditionError: There is none that works (`NO_TRITON`, `NO_LIBPYTHON`).
    """
    folder = settings.triton_environment or Path(sys.prefix).parent / ".venv-triton"
    return TritonEnvironment.open(folder)


def triton_parts(
    environment: TritonEnvironment,
    settings: Settings,
    common: Mapping[str, str],
    ports: Mapping[str, int],
    platform_id: str,
) -> list[Part]:
    """Return the parts; the platform is ready without them, and draws in process until they are.

    Args:
        environment: What holds the server.
        settings: With the server's address.
        common: Variables of the platform's processes.
        ports: By `PORT_NAMES`.
        platform_id: The platform's.
    """
    host = settings.host
    repository = settings.home_path / "triton" / "models"
    repository.mkdir(parents=True, exist_ok=True)
    own = TritonPorts(*(ports[name] for name in PORT_NAMES))
    triton = Part(
        "triton",
        tuple(
            server.server_command(
                environment, repository, own, (), host=host, shared_memory=_region(platform_id)
            )
        ),
        # Nothing of ours but the mark: another libpython or numpy in sight breaks its backend.
        {**environment.variables(), MARK: platform_id},
        ready=triton_ready(f"http://{host}:{own.http}"),
        address=settings.triton_address,
        metrics_address=f"{host}:{own.metrics}",
        grace_seconds=15.0,
        first_attempts=3,
        background=True,
    )
    engines = Part(
        "engines",
        (sys.executable, "-m", "toile.serving", "engines", "--repository", str(repository)),
        {**common, **settings.environment()},
        # The export takes a processor for a minute: not while the rest comes up.
        needs=("triton", "models"),
        again_with="triton",
        background=True,
    )
    return [triton, engines]


def remove_shared_memory(platform_id: str) -> None:
    """Remove what a server of the platform left in shared memory when it was killed."""
    server.remove_shared_memory(_region(platform_id))


def _region(platform_id: str) -> str:
    return f"toile-{platform_id[:12]}-"
