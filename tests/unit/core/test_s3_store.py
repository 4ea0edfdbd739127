"""The errors of an S3 server, each as Toile's own. The contract tests use a real server."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DiskFullError,
    InvalidArgumentError,
    NotFoundError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.settings import S3Settings, Settings


@dataclass
class Answer:
    """What the server says to everything, and what it was asked."""

    status: int = 200
    code: str = ""
    body: bytes | None = None
    headers: dict[str, str] | None = None
    asked: int = 0

    @property
    def data(self) -> bytes:
        if self.body is not None:
            return self.body
        return f"<Error><Code>{self.code}</Code><Message>m</Message></Error>".encode()


@pytest.fixture
def answer() -> Answer:
    return Answer()


@pytest.fixture
def server(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            answer.asked += 1
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(answer.status)
            for name, value in {
                "Content-Type": "application/xml",
                "Content-Length": str(len(answer.data)),
                **(answer.headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.block_on_close = False
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def s3_store(endpoint: str) -> ArtifactStore:
    s3 = S3Settings(endpoint=endpoint, access_key="a", secret_key="b", secure=False)
    return open_store(Settings(artifacts_url="s3", s3=s3))


@pytest.fixture
def store(server: str) -> ArtifactStore:
    return s3_store(server)


@pytest.mark.parametrize(
    ("status", "code", "expected", "reason"),
    [
        (404, "NoSuchKey", NotFoundError, "ARTIFACT_NOT_FOUND"),
        (412, "PreconditionFailed", AlreadyExistsError, "ARTIFACT_EXISTS"),
        (409, "ConditionalRequestConflict", AlreadyExistsError, "ARTIFACT_EXISTS"),
        (507, "XMinioStorageFull", DiskFullError, "DISK_FULL"),
        (403, "AccessDenied", StoreUnavailableError, "STORE_DENIED"),
        (403, "SignatureDoesNotMatch", StoreUnavailableError, "STORE_DENIED"),
        (403, "InvalidAccessKeyId", StoreUnavailableError, "STORE_DENIED"),
        (400, "SomethingNew", StoreUnavailableError, "STORE_UNAVAILABLE"),
        (503, "SlowDown", StoreUnavailableError, "STORE_UNAVAILABLE"),
        (500, "InternalError", StoreUnavailableError, "STORE_UNAVAILABLE"),
    ],
)
def test_maps_error_codes(
    store: ArtifactStore,
    answer: Answer,
    status: int,
    code: str,
    expected: type[ToileError],
    reason: str,
) -> None:
    answer.status, answer.code = status, code
    with pytest.raises(expected) as caught:
        store.put("k", b"x", if_absent=True)
    assert caught.value.reason == reason
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("status", [403, 500])
def test_maps_errors_without_a_body(store: ArtifactStore, answer: Answer, status: int) -> None:
    answer.status = status
    with pytest.raises(StoreUnavailableError):
        store.stat("k")


def test_a_page_from_something_else_is_not_a_store(store: ArtifactStore, answer: Answer) -> None:
    answer.status, answer.body = 400, b"<html>Bad gateway</html>"
    answer.headers = {"Content-Type": "text/html"}
    with pytest.raises(StoreUnavailableError):
        store.get("k")


def test_hiccups_are_tried_again(store: ArtifactStore, answer: Answer) -> None:
    answer.status, answer.code = 503, "SlowDown"
    with pytest.raises(StoreUnavailableError):
        store.get("k")
    assert answer.asked > 2


def test_bytes_that_rotted_are_not_given_out(store: ArtifactStore, answer: Answer) -> None:
    answer.body, answer.headers = b"evil", {"x-amz-meta-sha256": "0" * 64}
    with pytest.raises(DataLossError):
        store.get("k")


def test_a_file_that_changes_while_it_is_sent_is_not_stored(
    store: ArtifactStore, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"second")
    # What a first reading saw.
    monkeypatch.setattr("toile.core.artifacts.s3.sha256", lambda data: ("0" * 64, 6))
    with pytest.raises(DataLossError):
        store.put("k", file)
    assert answer.asked == 0


def test_a_server_that_hangs_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = s3_store(f"127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            store.check()
        assert time.monotonic() - start < 8


def test_opening_connects_to_nothing_and_refuses_nonsense() -> None:
    s3_store("127.0.0.1:1")
    with pytest.raises(InvalidArgumentError):
        s3_store("http://minio:9000/path")
    with pytest.raises(InvalidArgumentError):
        open_store(Settings(artifacts_url="ftp://somewhere"))


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "my garments #1 100%"
    open_store(Settings(artifacts_url=folder.as_uri())).put("k", b"x")
    assert (folder / "objects/k").read_bytes() == b"x"
