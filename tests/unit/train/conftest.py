"""The train service over a catalog with a base and a dataset, and versions to have trained."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from toile.core.artifacts import ArtifactStore, open_store, publish
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    ModelVersionRow,
)
from toile.core.jobs import JobStore
from toile.core.names import ModelVersionName
from toile.core.rpc.client import Clients
from toile.core.rpc.server import start
from toile.core.settings import Settings
from toile.diffusion.shipped import shipped_bundle_path
from toile.train.__main__ import build_service
from toile.train.handler import TrainHandler
from toile.v1 import train_pb2, train_pb2_grpc

CAPTIONS = ["<lace> white dress", "<lace> white dress", "", "<lace> black skirt", "<lace> red hat"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", grace_seconds=0.1)


@pytest.fixture
def catalog(settings: Settings) -> Iterator[Catalog]:
    catalog = open_catalog(settings)
    catalog.migrate()
    with catalog.transaction() as session:
        session.add(
            BaseRow(name="bases/tiny", artifact="bases/tiny/0", digest="b", native_size=128)
        )
        for dataset in ("lace", "unbuilt"):
            name = f"projects/p/datasets/{dataset}"
            session.add(DatasetRow(name=name, project="p", trigger_word="<lace>"))
        session.flush()
        for number in (1, 2):
            session.add(version_row(number))
        session.flush()
        for index, caption in enumerate(CAPTIONS):
            session.add(
                DatasetItemRow(
                    version="projects/p/datasets/lace/versions/2",
                    file_name=f"{index:06d}.png",
                    caption=caption,
                    caption_imported=True,
                    source_file_name="a.jpg",
                    source_digest="0" * 64,
                )
            )
    yield catalog
    catalog.close()


def version_row(number: int) -> DatasetVersionRow:
    name = f"projects/p/datasets/lace/versions/{number}"
    return DatasetVersionRow(
        name=name,
        dataset="projects/p/datasets/lace",
        number=number,
        digest=str(number) * 64,
        artifact=f"{name}/made",
        trigger_word="<lace>",
        resolution=128,
        image_count=5,
        rejected=[],
        job="projects/p/jobs/made",
    )


@pytest.fixture(scope="session")
def bundle_path() -> Path:
    """Folder of the base."""
    folder = shipped_bundle_path()
    assert folder is not None
    return folder


@pytest.fixture
def base_files(bundle_path: Path) -> dict[str, bytes | Path]:
    """What the service asks of a base: configurations and tokenizers; this one is blind."""
    files = {path.relative_to(bundle_path).as_posix(): path for path in bundle_path.rglob("*.json")}
    sees = ("image_encoder/", "segmenter/")
    return {name: path for name, path in files.items() if not name.startswith(sees)}


@pytest.fixture
def store(settings: Settings, base_files: dict[str, bytes | Path]) -> ArtifactStore:
    store = open_store(settings)
    publish(store, "bases/tiny/0", base_files)
    return store


@pytest.fixture
def handler(settings: Settings, catalog: Catalog, store: ArtifactStore) -> TrainHandler:
    return TrainHandler(settings, catalog, store)


@pytest.fixture
def publish_version(
    handler: TrainHandler, catalog: Catalog, store: ArtifactStore
) -> Callable[..., str]:
    """Ends a training as its worker does; returns the version's name."""

    def publish_one(model: str = "lace", recipe: str = "lora") -> str:
        request = train_pb2.CreateTrainingJobRequest(
            parent="projects/p", model_id=model, dataset="projects/p/datasets/lace"
        )
        getattr(request, recipe).SetInParent()
        job = handler.create(request)
        jobs = JobStore(catalog)
        jobs.next_attempt(job.name, after=0)
        jobs.start(job.name, 1)
        name = ModelVersionName.parse(job.target)
        manifest = publish(store, f"{name}/made", {"a/b.bin": b"x" * (3 << 20)})
        store.put(f"{name}/made.bank/layout.safetensors", b"packed")
        with catalog.transaction() as session:
            session.add(
                ModelVersionRow(
                    name=str(name),
                    model=str(name.model_name),
                    number=int(name.version),
                    adapter_type=job.spec["recipe"],
                    artifact=f"{name}/made",
                    digest=manifest.digest,
                    base="bases/tiny",
                    dataset_version=job.spec["dataset_version"],
                    dataset_digest="2" * 64,
                    trigger_word="<lace>",
                    config=job.spec["config"],
                    final_loss=0.125,
                    reproduction_difference=0.0,
                    metrics={
                        "published_step": 60,
                        "steps": 90,
                        "validation_loss": 0.25,
                        "sample_scores": {"prompt": 0.75},
                        "alignment": 0.625,
                        "alignment_without_control": 0.125,
                    },
                    code_version="0",
                    files=[
                        {"path": path, "size_bytes": entry.size_bytes, "digest": entry.digest}
                        for path, entry in manifest.files.items()
                    ],
                    job=job.name,
                )
            )
            jobs.succeed(session, job.name, 1)
        return str(name)

    return publish_one


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def address(settings: Settings, catalog: Catalog, loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    """Address of the service."""
    service = replace(build_service(settings), background=[])  # nothing is sent to Ray
    running = asyncio.run_coroutine_threadsafe(start(service, settings), loop).result(timeout=60)
    try:
        yield f"127.0.0.1:{running.port}"
    finally:
        asyncio.run_coroutine_threadsafe(running.stop(), loop).result(timeout=60)


@pytest.fixture
def train(address: str, settings: Settings) -> Iterator[train_pb2_grpc.TrainServiceStub]:
    """A client of the service, whose calls raise typed errors."""
    with Clients(settings.model_copy(update={"train_address": address})) as clients:
        yield clients.train


@pytest.fixture
def toile(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs `toile models …` in project p and returns its JSON, or the line of its error."""
    for service in ("DATASET", "TRAIN", "GENERATE", "RANK", "REFINE"):
        monkeypatch.setenv(f"TOILE_{service}_ADDRESS", address)
    monkeypatch.setenv("TOILE_PROJECT", "p")

    def run(*arguments: str) -> Any:
        from toile.cli.main import app

        result = CliRunner().invoke(app, ["models", *arguments, "--json"])
        return json.loads(result.stdout) if result.exit_code == 0 else result.stderr.strip()

    with capture_logs():  # the service logs to the same standard output
        yield run
