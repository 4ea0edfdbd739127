"""A client of Triton's HTTP interface: KServe's protocol, version 2, with tensors as bytes.

A step of a small UNet takes longer by gRPC than by HTTP/1.1, and Triton's own HTTP client takes no
deadline for one call (ADR 23).

Sources: https://github.com/kserve/open-inference-protocol and, for tensors as bytes, Triton's
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

import contextlib
import http.client
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: Mapping[str, npt.DTypeLike] = {
    "FP32": np.float32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BYTES": object,
}
"""NumPy's types by the protocol's names: of what fronts take and give."""
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
UNAVAILABLE = 503
"""The status of a server that starts or ends."""
UNREADABLE = "the answer makes no sense"
"""Begins the message of what is no answer by the protocol."""
_HEADER_LENGTH = "Inference-Header-Content-Length"
_OK = 200


class TritonError(Exception):
    """A server did not do what it was asked for."""


class TritonRefusedError(TritonError):
    """The server answered with an error; the message is its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP."""


class TritonGoneError(TritonError):
    """There was no answer: nobody listens, or the connection was lost on the way."""


class TritonLateError(TritonError):
    """There was no answer in the seconds that it may take."""


class TritonClient:
    """Talks to one server, from any number of threads; each call takes a connection of its own.

    Connections are kept for the next call until the client is closed; a server that is told to end
    waits for that.

    All methods take the seconds that an answer may take and raise a `TritonError`.
    """

    def __init__(self, address: str) -> None:
        """Make a client; nothing is asked yet.

        Args:
            address: host:port of the server's HTTP.
        """
        self._address = address
        self._idle: deque[http.client.HTTPConnection] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that no call uses."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread took the last
                self._idle.pop().close()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        seconds: float,
        identity: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> dict[str, Array]:
        """Have a model answer.

        Args:
            model: Its name.
            inputs: By name, each of one of `DTYPES`; text as arrays of `str`.
            seconds: See above.
            identity: Of the request, as the model and the server's log see it.
            parameters: Of the request.

        Returns:
            The outputs by name; their memory is read-only.
        """
        tensors, described = [], []
        for name, array in inputs.items():
            datatype, content = _NAMES[array.dtype], _to_bytes(array)
            tensors.append(content)
            described.append(
                {
                    "name": name,
                    "shape": array.shape,
                    "datatype": datatype,
                    "parameters": {"binary_data_size": len(content)},
                }
            )
        given = {**(parameters or {}), "binary_data_output": True}
        header = json.dumps({"id": identity, "inputs": described, "parameters": given}).encode()
        headers, answer = self._ask(
            "POST",
            f"/v2/models/{model}/infer",
            b"".join((header, *tensors)),
            seconds,
            {_HEADER_LENGTH: str(len(header))},
        )
        try:
            length = int(headers.get(_HEADER_LENGTH, len(answer)))
            outputs = json.loads(answer[:length])["outputs"]
            return dict(_outputs(outputs, memoryview(answer)[length:]))
        except (ValueError, KeyError, TypeError) as error:
            raise TritonRefusedError(f"{UNREADABLE}: {error!r}", _OK) from error

    def is_ready(self, model: str, *, seconds: float = 2.0) -> bool:
        """Say whether the server is there and has a model."""
        try:
            self._ask("GET", f"/v2/models/{model}/ready", b"", seconds)
        except TritonError:
            return False
        return True

    def load(self, model: str, *, seconds: float) -> None:
        """Have the server open a model of its repository; anew if its files changed since."""
        self._ask("POST", f"/v2/repository/models/{model}/load", b"{}", seconds)

    def unload(self, model: str, *, seconds: float) -> None:
        """Have the server close a model; what it works on is finished while this returns."""
        self._ask("POST", f"/v2/repository/models/{model}/unload", b"{}", seconds)

    def ready_models(self, *, seconds: float) -> list[str]:
        """Return the names of the models that are open."""
        _, answer = self._ask("POST", "/v2/repository/index", b'{"ready": true}', seconds)
        return sorted({model["name"] for model in json.loads(answer)})

    def inputs(self, model: str, *, seconds: float) -> list[dict[str, Any]]:
        """Return `name`, `datatype` and `shape` of each input of a model."""
        _, answer = self._ask("GET", f"/v2/models/{model}", b"", seconds)
        found: list[dict[str, Any]] = json.loads(answer)["inputs"]
        return found

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:
        try:
            with self._connection(seconds) as connection:
                connection.request(method, path, body, headers or {})
                response = connection.getresponse()
                answer = response.read()
        except TimeoutError as error:
            raise TritonLateError(f"Triton did not answer in {seconds:.3g} s") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()  # of a server that went, the others are dead, too
            raise TritonGoneError(f"no answer of Triton at {self._address}: {error!r}") from error
        if response.status != _OK:
            raise TritonRefusedError(_message(answer), response.status)
        return response.headers, answer

    @contextlib.contextmanager
    def _connection(self, seconds: float) -> Iterator[http.client.HTTPConnection]:
        """Hold a connection; it is kept for others unless what was asked on it failed."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = http.client.HTTPConnection(self._address)
        connection.timeout = seconds
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)


def _to_bytes(array: Array) -> bytes:
    """Return a tensor in row-major order; each text with its length before it."""
    if array.dtype != object:
        return array.tobytes()
    texts = [str(text).encode() for text in array.flat]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def _outputs(described: Iterable[Any], content: memoryview) -> Iterator[tuple[str, Array]]:
    for one in described:
        size = one["parameters"]["binary_data_size"]
        array = np.frombuffer(content[:size], DTYPES[one["datatype"]])
        content = content[size:]
        yield one["name"], array.reshape(one["shape"])


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace").strip()


def are_ready(address: str, models: Iterable[str]) -> bool:
    """Say whether a server answers with all these models ready."""
    with TritonClient(address) as client:
        return all(client.is_ready(model) for model in models)
