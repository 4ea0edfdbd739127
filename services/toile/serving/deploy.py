"""Putting the application on a Ray cluster, and asking how it is."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import tenacity
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, gRPCOptions

from toile.core.bases import resolve_base
from toile.core.catalog.engine import open_catalog
from toile.core.errors import ComputeUnavailableError, NotFoundError
from toile.core.inference_health import check_models
from toile.core.settings import Settings
from toile.serving.app import APPLICATION, build_app

SERVICER = "toile.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server"

CONTROLLER_VARIABLES = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Serve kills a proxy that is not up in 5 seconds, which a busy machine does not always manage."""

ROUTES_SECONDS = 60.0
"""How long the proxy may take to hear of the application."""


@dataclass(frozen=True)
class ApplicationStatus:
    """How the application is: Serve's own word for its state, and replicas by state."""

    state: str
    message: str
    replicas: dict[str, int]

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self.state == "RUNNING"


def deploy(settings: Settings, *, ray_address: str, port: int = 0) -> int:
    """Run the application on a Ray cluster and return its gRPC port; blocks until it is healthy.

    The application stays when this process ends. Deploying again replaces its replicas.

    Args:
        settings: Passed to every replica.
        ray_address: host:port of the cluster, or "auto".
        port: Port of the gRPC proxy; a free one when 0.

    Raises:
        ComputeUnavailableError: The cluster is away, the application does not start, or Serve
            runs already at another port.
    """
    warm_base = _default_base_artifact(settings)
    with _connected(ray_address):
        chosen = port or _free_port()
        try:
            serve.start(
                proxy_location="HeadOnly",
                # Nobody speaks HTTP to it, but Serve has no switch for that alone.
                http_options=HTTPOptions(host="127.0.0.1", port=_free_port()),
                grpc_options=gRPCOptions(
                    port=chosen, grpc_servicer_functions=[SERVICER], enable_reflection=False
                ),
                controller_options={"runtime_env": {"env_vars": CONTROLLER_VARIABLES}},
            )
            # Without a route Serve leaves an application out of its gRPC proxy, too.
            serve.run(build_app(settings, warm_base=warm_base), name=APPLICATION, route_prefix="/")
        except (RuntimeError, RayError) as error:
            raise ComputeUnavailableError(f"the models do not start: {error}") from error
        _wait_for_routes(settings, chosen)
        return chosen


def status(*, ray_address: str) -> ApplicationStatus:
    """Say how the application is.

    Raises:
        ComputeUnavailableError: The cluster is away.
    """
    with _connected(ray_address):
        try:
            application = serve.status().applications.get(APPLICATION)
        except RayError as error:
            raise ComputeUnavailableError(f"Ray Serve does not answer: {error}") from error
        if application is None:
            return ApplicationStatus("NOT_DEPLOYED", "", {})
        replicas: dict[str, int] = {}
        for deployment in application.deployments.values():
            for state, count in deployment.replica_states.items():
                replicas[str(state)] = replicas.get(str(state), 0) + count
        return ApplicationStatus(application.status.value, application.message, replicas)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, namespace="serve", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ComputeUnavailableError(f"Ray does not answer at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _wait_for_routes(settings: Settings, port: int) -> None:
    """Wait until the application answers at the port.

    Serve keeps its first port until the cluster ends, whatever it is asked for later.
    """
    told = settings.model_copy(update={"inference_address": f"127.0.0.1:{port}"})
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ComputeUnavailableError),
        wait=tenacity.wait_fixed(0.2),
        stop=tenacity.stop_after_delay(ROUTES_SECONDS),
        reraise=True,
    )
    retrying(check_models, told)


def _default_base_artifact(settings: Settings) -> str:
    catalog = open_catalog(settings)
    try:
        with catalog.reading() as session:
            return resolve_base(session, settings.default_base).artifact
    except NotFoundError:  # imported later; loaded by the first request
        return ""
    finally:
        catalog.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
