import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from toile.core.errors import ComputeUnavailableError
from toile.core.inference_health import check_models
from toile.core.settings import Settings


@contextmanager
def proxy(answer: bytes | None) -> Iterator[Settings]:
    """Settings for a server that lists applications as Ray Serve's proxy does; None: it cannot."""
    server = grpc.server(ThreadPoolExecutor(1))
    if answer is not None:
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "ray.serve.RayServeAPIService", {"ListApplications": handler}
                )
            ]
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Settings(inference_address=f"127.0.0.1:{port}")
    server.stop(None)


def test_the_application_is_there() -> None:
    with proxy(b"\x0a\x05other\x0a\x05toile") as settings:
        check_models(settings)


@pytest.mark.parametrize("answer", [b"", b"\x0a\x05other", b"\x0a\x09toilettes"])
def test_serve_runs_without_the_application(answer: bytes) -> None:
    with proxy(answer) as settings, pytest.raises(ComputeUnavailableError):
        check_models(settings)


def test_a_server_that_is_no_proxy_is_the_models_itself() -> None:
    with proxy(None) as settings:
        check_models(settings)


def test_nothing_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = Settings(inference_address=f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ComputeUnavailableError):
            check_models(settings)


def test_no_address() -> None:
    with pytest.raises(ComputeUnavailableError) as caught:
        check_models(Settings())
    assert caught.value.reason == "NO_ADDRESS"
