"""A train service in this process, over a real Ray head, with a dataset version to train on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import numpy as np
from PIL import Image, ImageDraw

from toile.core.artifacts import ArtifactStore, open_store, publish_folder
from toile.core.bases import import_base
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import DatasetItemRow, DatasetRow, DatasetVersionRow
from toile.core.rpc.server import RunningService, start
from toile.core.settings import Settings
from toile.train.__main__ import build_service
from toile.v1 import job_pb2, job_pb2_grpc, train_pb2, train_pb2_grpc

DATASET = "projects/p/datasets/lace"
IMAGES = 4
PATIENCE_SECONDS = 1500


@dataclass
class Platform:
    """A running service and what is behind it."""

    settings: Settings
    catalog: Catalog
    store: ArtifactStore
    service: RunningService
    train: train_pb2_grpc.TrainServiceAsyncStub  # in the generated .pyi alone
    jobs: job_pb2_grpc.JobServiceAsyncStub

    async def watch(self, name: str, after: int = 0) -> list[job_pb2.WatchJobResponse]:
        """Follow a job to its end."""
        request = job_pb2.WatchJobRequest(name=name, after_sequence=after)
        responses = self.jobs.WatchJob(request, timeout=PATIENCE_SECONDS)
        return [response async for response in responses]

    async def wait_for(
        self, name: str, wanted: Callable[[job_pb2.JobEvent], bool]
    ) -> list[job_pb2.JobEvent]:
        """Wait for an event; return what the job told until then."""
        request = job_pb2.WatchJobRequest(name=name)
        told: list[job_pb2.JobEvent] = []
        async for response in self.jobs.WatchJob(request, timeout=PATIENCE_SECONDS):
            told.append(response.event)
            if wanted(response.event):
                return told
        raise AssertionError(f"{name} ended before that")


def request_of(
    model: str = "lace-style", request_id: str = "", **config: object
) -> train_pb2.CreateTrainingJobRequest:
    """A small training."""
    values = {"rank": 4, "steps": 12, "batch_size": 2, "checkpoint_interval_steps": 4, **config}
    return train_pb2.CreateTrainingJobRequest(
        parent="projects/p",
        model_id=model,
        dataset=DATASET,
        lora=train_pb2.LoraConfig(**values),  # type: ignore[arg-type]
        request_id=request_id,
    )


def control_request_of(
    model: str = "lace-lines", **config: object
) -> train_pb2.CreateTrainingJobRequest:
    """A small training of a ControlNet."""
    values = {"steps": 12, "batch_size": 2, "checkpoint_interval_steps": 4, **config}
    return train_pb2.CreateTrainingJobRequest(
        parent="projects/p",
        model_id=model,
        dataset=DATASET,
        controlnet=train_pb2.ControlNetConfig(**values),  # type: ignore[arg-type]
    )


def settings_for(home: Path, jobs_url: str) -> Settings:
    """Settings of a platform of its own, on cores that other tests keep busy."""
    return Settings(
        home=home, ray_jobs_url=jobs_url, grace_seconds=1.0, log_level="warning", cpu_threads=1
    )


def prepared(home: Path, bundle: Path) -> Settings:
    """Settings of a platform that knows a base and a dataset version, but has no Ray."""
    settings = settings_for(home, "")
    prepare(settings, bundle)
    return settings


def prepare(settings: Settings, bundle: Path) -> None:
    """Make the catalog, import the base and publish a dataset version."""
    catalog, store = open_catalog(settings), open_store(settings)
    catalog.migrate()
    import_base(settings, catalog, store, bundle, "bases/tiny")
    folder = settings.home_path / "version"
    digest = publish_folder(store, f"{DATASET}/versions/1/made", write_version(folder)).digest
    with catalog.transaction() as session:
        session.add(DatasetRow(name=DATASET, project="p", trigger_word="<lace>"))
        session.flush()
        session.add(
            DatasetVersionRow(
                name=f"{DATASET}/versions/1",
                dataset=DATASET,
                number=1,
                digest=digest,
                artifact=f"{DATASET}/versions/1/made",
                trigger_word="<lace>",
                resolution=128,
                image_count=IMAGES,
                rejected=[],
                job="projects/p/jobs/made",
            )
        )
        session.flush()
        for index in range(IMAGES):
            session.add(
                DatasetItemRow(
                    version=f"{DATASET}/versions/1",
                    file_name=f"{index:06d}.png",
                    caption=f"<lace> dress {index % 2}",
                    caption_imported=True,
                    source_file_name=f"{index}.jpg",
                    source_digest=f"{index:064d}",
                )
            )
    catalog.close()


def write_version(folder: Path, count: int = IMAGES) -> Path:
    """Write a dataset version's folder."""
    (folder / "masks").mkdir(parents=True)
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as lines:
        for index in range(count):
            name, side = f"{index:06d}.png", 128
            image = Image.new(
                "RGB", (side, side), tuple(int(c) for c in random.integers(0, 256, 3))
            )
            draw = ImageDraw.Draw(image)
            for x in range(0, side, 8 + 4 * index):
                draw.line([(x, 0), (side - x, side)], fill="white", width=2)
            image.save(folder / name)
            mask = Image.new("L", image.size)
            mask.paste(1, (32, 16, 96, 112))
            mask.save(folder / "masks" / name)
            entry = {
                "file_name": name,
                "text": f"<lace> dress {index % 2}",
                "mask": f"masks/{name}",
                "source_file_name": f"{index}.jpg",
            }
            lines.write(json.dumps(entry) + "\n")
    return folder


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Platform]:
    """Run the train service."""
    service = await start(build_service(settings), settings)
    catalog = open_catalog(settings)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            yield Platform(
                settings,
                catalog,
                open_store(settings),
                service,
                train_pb2_grpc.TrainServiceStub(channel),  # type: ignore[arg-type]
                job_pb2_grpc.JobServiceStub(channel),  # type: ignore[arg-type]
            )
    finally:
        await service.stop()
        catalog.close()
