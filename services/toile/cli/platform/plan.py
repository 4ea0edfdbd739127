"""The plan of a platform on one machine: its parts in the order of their needs, and their ports."""

import getpass
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from toile.cli.platform import triton_parts
from toile.cli.platform.farewells import jobs_ended
from toile.cli.platform.parts import SERVICES, Part, Plan
from toile.cli.platform.ports import free_ports
from toile.cli.platform.probes import health_serving, ray_head_alive
from toile.cli.platform.state import MARK
from toile.core.errors import FailedPreconditionError
from toile.core.settings import Settings
from toile.diffusion.triton.server import TritonEnvironment

# A scheduling number, not a measure of the machine: with fewer, the trainer, its coordinator,
# data tasks and replicas wait for one another on a small machine.
_LOGICAL_CPUS = 8
_OBJECT_STORE_BYTES = 300 << 20
# Unix sockets have at most 107 bytes; Ray adds about 65 to its folder's name.
_LONGEST_SCRATCH = 40


# Options of `ray start` that take a port; its workers take free ones when they start.
_RAY_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
)


# Ray's workers give way to every other process, but somebody waits for the models' replica, and
# the engine beside it does not give way. Trainings do so by themselves.
_SERVE_URGENCY = {"RAY_worker_niceness": "0"}

# Between SIGTERM and SIGKILL of a job: a training that is told to end keeps a checkpoint first.
_JOB_PATIENCE_SECONDS = 30

# A head that is told to end drains its node first, for traffic to leave it. Here none is left.
_HEAD_PATIENCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}

# Serve ends a proxy that does not answer within 5 s, which on a busy machine is no sign of death.
_SERVE_PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def plan_platform(
    settings: Settings, platform_id: str, triton: TritonEnvironment | None = None
) -> Plan:
    """Choose ports and say what to run.

    Args:
        settings: The platform's.
        platform_id: Of this run of it.
        triton: What holds the Triton server; designs are drawn in process when None.

    Raises:
        ExhaustedError: No ports are free.
        FailedPreconditionError: The scratch folder is not ours.
    """
    host = settings.host
    metrics_names = (f"{service}_metrics" for service in SERVICES)
    names = ("inference", *_RAY_PORTS, *SERVICES, *metrics_names, *triton_parts.PORT_NAMES)
    ports = dict(zip(names, free_ports(host, len(names)), strict=True))
    addresses = {f"{name}_address": f"{host}:{ports[name]}" for name in SERVICES}
    addresses["inference_address"] = f"{host}:{ports['inference']}"
    if triton is not None:
        addresses["triton_address"] = f"{host}:{ports['triton_http']}"
    addresses["ray_jobs_url"] = f"http://{host}:{ports['dashboard-port']}"
    token = secrets.token_hex(32)
    told = settings.model_copy(
        update={"home": settings.home_path, "ray_auth_token": SecretStr(token), **addresses}
    )
    common = _common_environment(platform_id)
    ray_address = f"{host}:{ports['port']}"
    scratch = scratch_folder(settings)
    parts = [
        Part("catalog", _module("toile.cli.platform.prepare"), {**common, **told.environment()}),
        _ray_head(told, common, {name: ports[name] for name in _RAY_PORTS}, scratch),
        Part(
            "models",
            _module("toile.serving", "deploy", "--port", str(ports["inference"])),
            {**common, **told.environment(), **_ray_token(told), "RAY_ADDRESS": ray_address},
            needs=("catalog", "ray"),
            again_with="ray",
            first_attempts=3,
            address=addresses["inference_address"],
        ),
    ]
    for name in SERVICES:
        metrics = ports[f"{name}_metrics"]
        own = told.model_copy(update={"port": ports[name], "metrics_port": metrics})
        parts.append(
            Part(
                name,
                _module(f"toile.{name}"),
                {**common, **own.environment()},
                # Ray is the long way to ready; while it starts nothing else should take its time.
                needs=("catalog", "ray"),
                ready=health_serving(addresses[f"{name}_address"]),
                address=addresses[f"{name}_address"],
                metrics_address=f"{host}:{metrics}",
                grace_seconds=settings.grace_seconds + 5,
            )
        )
    if triton is not None:
        parts += triton_parts.triton_parts(triton, told, common, ports, platform_id)
    return Plan(platform_id, tuple(parts), addresses, ray_address, scratch)


def scratch_folder(settings: Settings) -> Path:
    """Return Ray's folder: short, and the same for the same `TOILE_HOME`.

    Raises:
        FailedPreconditionError: It exists and belongs to somebody else.
    """
    place = Path(tempfile.gettempdir())
    if len(str(place)) > _LONGEST_SCRATCH - 16:
        place = Path("/tmp")  # noqa: S108 - the length matters, and the owner is checked
    who = f"{getpass.getuser()}:{settings.home_path}"
    folder = place / f"toile-{hashlib.sha256(who.encode()).hexdigest()[:8]}"
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return folder
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise FailedPreconditionError(f"{folder} is in the way and not ours", reason="SCRATCH")
    return folder


def empty_folder(folder: Path) -> None:
    """Make a folder that only we can read, without what it held before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _common_environment(platform_id: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    binaries = str(Path(sys.executable).parent)
    return {
        **inherited,
        MARK: platform_id,
        "PATH": f"{binaries}{os.pathsep}{inherited.get('PATH', os.defpath)}",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray renames its workers; without this the new name overwrites the mark.
        "SPT_NOENV": "1",
    }


def _ray_token(settings: Settings) -> dict[str, str]:
    """Have Ray ask for the platform's own token: some of its ports listen on every interface."""
    token = settings.ray_auth_token.get_secret_value()
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _ray_head(
    settings: Settings, common: Mapping[str, str], ports: Mapping[str, int], scratch: Path
) -> Part:
    host, dashboard = settings.host, ports["dashboard-port"]
    options = {
        **ports,
        "node-ip-address": host,
        "dashboard-host": host,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": _LOGICAL_CPUS,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": scratch,
        "include-log-monitor": "false",
        "log-color": "false",
    }
    return Part(
        "ray",
        _module(
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            *(f"--{name}={value}" for name, value in options.items()),
        ),
        # Jobs inherit the head's variables, and with them the settings.
        {
            **common,
            **_HEAD_PATIENCE,
            **_SERVE_PATIENCE,
            **_SERVE_URGENCY,
            "RAY_JOB_STOP_WAIT_TIME_S": str(_JOB_PATIENCE_SECONDS),
            **settings.environment(),
            **_ray_token(settings),
        },
        ready=ray_head_alive(
            f"http://{host}:{dashboard}", settings.ray_auth_token.get_secret_value()
        ),
        address=f"{host}:{dashboard}",
        metrics_address=f"{host}:{ports['metrics-export-port']}",
        before_end=jobs_ended(settings, _JOB_PATIENCE_SECONDS),
        grace_seconds=15.0,
        scratch=scratch,
        # On a machine that is busy it gives itself up after 30 s.
        first_attempts=5,
    )
