"""The client of Triton's HTTP, against servers that misbehave; the real one is in integration."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from toile.diffusion.triton.client import (
    UNREADABLE,
    TritonClient,
    TritonGoneError,
    TritonLateError,
    TritonRefusedError,
    are_ready,
)

SAMPLE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

Answer = tuple[int, dict[str, str], bytes]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Callable[[str, dict[str, str], bytes], Answer]
    connections: set[Any]

    def do_POST(self) -> None:
        self.connections.add(self.client_address)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = type(self).answer(self.path, dict(self.headers), body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815  what the base class looks for

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Callable[[str, dict[str, str], bytes], Answer]) -> Iterator[tuple[str, set]]:
    """A server that answers so: its address, and the connections that were made to it."""
    handler = type("Handler", (_Handler,), {"answer": staticmethod(answer), "connections": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", handler.connections
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def echo(path: str, headers: dict[str, str], body: bytes) -> Answer:
    """Give each input back, as the protocol has it."""
    assert path == "/v2/models/echo/infer"
    length = int(headers["Inference-Header-Content-Length"])
    asked = json.loads(body[:length])
    header = json.dumps({"id": asked["id"], "outputs": asked["inputs"]}).encode()
    return 200, {"Inference-Header-Content-Length": str(len(header))}, header + body[length:]


def test_tensors_come_back_as_they_were_sent() -> None:
    number = np.array([[2**62], [-1]], np.int64)
    pixels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    with serving(echo) as (address, _), TritonClient(address) as client:
        found = client.infer(
            "echo", {"sample": SAMPLE.T, "number": number, "pixels": pixels}, seconds=5.0
        )
    np.testing.assert_array_equal(found["sample"], SAMPLE.T)
    np.testing.assert_array_equal(found["number"], number)
    np.testing.assert_array_equal(found["pixels"], pixels)
    assert found["sample"].dtype == np.float32
    assert not found["sample"].flags.writeable


def test_what_a_request_says() -> None:
    seen: dict[str, Any] = {}

    def answer(path: str, headers: dict[str, str], body: bytes) -> Answer:
        length = int(headers["Inference-Header-Content-Length"])
        seen.update(header=json.loads(body[:length]), content=body[length:])
        return 200, {}, b'{"outputs": []}'

    text = np.array([["[]"], ["ä"]], dtype=object)
    with serving(answer) as (address, _), TritonClient(address) as client:
        inputs = {"adapters": text}
        assert (
            client.infer("m", inputs, seconds=5.0, identity="7", parameters={"unload": "a"}) == {}
        )
    assert seen["header"]["id"] == "7"
    assert seen["header"]["parameters"] == {"unload": "a", "binary_data_output": True}
    (one,) = seen["header"]["inputs"]
    assert (one["datatype"], one["shape"]) == ("BYTES", [2, 1])
    assert one["parameters"]["binary_data_size"] == len(seen["content"])
    assert seen["content"] == b"\x02\0\0\0[]" + b"\x02\0\0\0" + "ä".encode()


def test_a_connection_is_kept_until_the_client_is_closed() -> None:
    with serving(echo) as (address, connections):
        with TritonClient(address) as client:
            for _ in range(3):
                client.infer("echo", {"sample": SAMPLE}, seconds=5.0)
        assert len(connections) == 1
        with TritonClient(address) as client:
            client.infer("echo", {"sample": SAMPLE}, seconds=5.0)
        assert len(connections) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"error": "no such model"}', "no such model"), (b"out of order\n", "out of order")],
)
def test_an_error_has_the_servers_words(content: bytes, message: str) -> None:
    with serving(lambda *_: (503, {}, content)) as (address, _), TritonClient(address) as client:
        with pytest.raises(TritonRefusedError, match=message) as caught:
            client.load("unet", seconds=5.0)
        assert caught.value.status == 503
        assert not client.is_ready("unet")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"outputs": [{"name": "x"}]}',
        b'{"outputs": [{"name": "x", "datatype": "FP32", "shape": [3], "parameters":'
        b' {"binary_data_size": 12}}]}',
        b'{"outputs": [{"name": "x", "datatype": "FP9", "shape": [0], "parameters":'
        b' {"binary_data_size": 0}}]}',
    ],
)
def test_an_answer_that_is_none_is_refused(content: bytes) -> None:
    with (
        serving(lambda *_: (200, {}, content)) as (address, _),
        TritonClient(address) as client,
        pytest.raises(TritonRefusedError, match=UNREADABLE),
    ):
        client.infer("m", {"sample": SAMPLE}, seconds=5.0)


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with TritonClient(address) as client, pytest.raises(TritonGoneError, match=address):
            client.ready_models(seconds=1.0)
        assert not are_ready(address, ["unet"])


def test_an_answer_that_takes_too_long_is_not_waited_for_nor_taken_later() -> None:
    free = threading.Event()

    def answer(path: str, headers: dict[str, str], body: bytes) -> Answer:
        if "slow" in path:
            free.wait(10)
            return 200, {}, b'[{"name": "slow"}]'
        return 200, {}, b'{"inputs": [{"name": "quick"}]}'

    with serving(answer) as (address, _), TritonClient(address) as client:
        with pytest.raises(TritonLateError):
            client.inputs("slow", seconds=0.05)
        free.set()
        assert client.inputs("quick", seconds=5.0) == [{"name": "quick"}]


def test_a_connection_that_the_server_closes_is_made_anew() -> None:
    with serving(lambda *_: (200, {"Connection": "close"}, b"[]")) as (address, connections):
        with TritonClient(address) as client:
            assert [client.ready_models(seconds=5.0) for _ in range(2)] == [[], []]
        assert len(connections) == 2


def test_half_an_answer_is_none() -> None:
    def hang_up() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\nhalf")

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=hang_up)
    thread.start()
    with TritonClient(address) as client, pytest.raises(TritonGoneError):
        client.ready_models(seconds=5.0)
    thread.join()
