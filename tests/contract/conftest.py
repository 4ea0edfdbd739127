"""The stores that artifacts can be kept in, each behind one face."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pytest

from servers.swift_s3 import ACCESS_KEY, SECRET_KEY, SwiftServer, running_swift
from toile.core.artifacts import ArtifactStore, open_store
from toile.core.settings import S3Settings, Settings

MINIO_VARIABLE = "TOILE_TEST_MINIO_URL"  # http://access:secret@host:port


class Place(Protocol):
    """Somewhere an empty store lives, and how to make it go away for a while."""

    settings: Settings

    def take_away(self) -> None: ...

    def bring_back(self) -> None: ...


@dataclass
class FolderPlace:
    root: Path
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        self.settings = Settings(artifacts_url=self.root.as_uri())

    @property
    def _elsewhere(self) -> Path:
        return self.root.with_name("away")

    def take_away(self) -> None:
        self.root.rename(self._elsewhere)

    def bring_back(self) -> None:
        self._elsewhere.rename(self.root)


@dataclass
class SwiftPlace:
    server: SwiftServer
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        self.settings = _s3_settings(self.server.endpoint, ACCESS_KEY, SECRET_KEY, secure=False)

    def take_away(self) -> None:
        self.server.stop()

    def bring_back(self) -> None:
        self.server.start()


@dataclass
class MinioPlace:
    url: str
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self.settings = _s3_settings(
            f"{parts.hostname}:{parts.port}",
            parts.username or "",
            parts.password or "",
            secure=parts.scheme == "https",
        )

    def take_away(self) -> None:
        pytest.skip("a MinIO that somebody else runs cannot be stopped")

    def bring_back(self) -> None: ...


def _s3_settings(endpoint: str, access_key: str, secret_key: str, *, secure: bool) -> Settings:
    return Settings(
        artifacts_url="s3",
        s3=S3Settings(
            endpoint=endpoint,
            bucket=f"test-{uuid.uuid4().hex}",
            access_key=access_key,
            secret_key=secret_key,
            secure=secure,
        ),
    )


@pytest.fixture(scope="session")
def swift_server() -> Iterator[SwiftServer]:
    pytest.importorskip("swift", reason="no S3 server: the swift package is not installed")
    with running_swift() as server:
        yield server


@pytest.fixture(params=["local", "swift", "minio"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty store, in turn in a folder, in Swift's S3 and in MinIO."""
    if request.param == "local":
        return FolderPlace(tmp_path / "artifacts")
    if request.param == "swift":
        return SwiftPlace(request.getfixturevalue("swift_server"))
    url = os.environ.get(MINIO_VARIABLE)
    if not url:
        pytest.skip(f"no MinIO: {MINIO_VARIABLE} is not set")
    return MinioPlace(url)


@pytest.fixture
def store(place: Place) -> ArtifactStore:
    """The empty store itself."""
    return open_store(place.settings)
