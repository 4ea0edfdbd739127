"""A catalog, a store and a service in process, over fake models: what rank and refine need."""

import contextlib
import hashlib
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from servers.inference import FakeModels, running_models
from toile.core.artifacts import ArtifactStore, open_store, publish
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    GenerationAdapterRow,
    GenerationRow,
    ModelRow,
    ModelVersionRow,
)
from toile.core.images import put_image
from toile.core.rpc.server import RunningService, Service, start
from toile.core.settings import Settings
from toile.v1 import common_pb2

PROJECT = "studio"
PARENT = f"projects/{PROJECT}"
DATASET = f"{PARENT}/datasets/lace"
VERSION = f"{DATASET}/versions/1"
MODEL_VERSION = f"{PARENT}/models/lace/versions/1"
NATIVE_SIZE = 128


@dataclass
class Platform:
    """What a test of a service holds."""

    settings: Settings
    catalog: Catalog
    store: ArtifactStore
    models: FakeModels
    service: RunningService
    channel: grpc.aio.Channel

    def add_image(
        self, pixels: np.ndarray, *, prompt: str = "", producer: str = "", project: str = PROJECT
    ) -> str:
        """Store an image as an upload or a generation's; returns its name."""
        origin = common_pb2.IMAGE_ORIGIN_GENERATED if producer else common_pb2.IMAGE_ORIGIN_UPLOADED
        row = put_image(
            self.store,
            project=project,
            data=png(pixels),
            width=pixels.shape[1],
            height=pixels.shape[0],
            origin=origin,
            producer=producer,
            prompt=prompt,
        )
        with self.catalog.transaction() as session:
            session.add(row)
        return row.name

    def add_dataset(self, *pictures: np.ndarray) -> str:
        """Publish a dataset version of these pictures; returns its name."""
        digest = hashlib.sha256(b"".join(p.tobytes() for p in pictures)).hexdigest()
        artifact = f"{DATASET}/versions/1/job"
        files = {f"images/{i:04}.png": png(p) for i, p in enumerate(pictures, start=1)}
        publish(self.store, artifact, files)
        with self.catalog.transaction() as session:
            session.add(DatasetRow(name=DATASET, project=PROJECT, trigger_word="<lace>"))
            session.flush()
            session.add(
                DatasetVersionRow(
                    name=VERSION,
                    dataset=DATASET,
                    number=1,
                    digest=digest,
                    artifact=artifact,
                    trigger_word="<lace>",
                    resolution=64,
                    image_count=len(pictures),
                    rejected=[],
                    job=f"{PARENT}/jobs/build",
                )
            )
            session.flush()
            for index, file_name in enumerate(files, start=1):
                session.add(
                    DatasetItemRow(
                        version=VERSION,
                        file_name=file_name,
                        caption="<lace>",
                        caption_imported=False,
                        source_file_name=f"{index}.jpg",
                        source_digest=digest,
                    )
                )
        return VERSION

    def add_generation(self, *, weight: float) -> str:
        """Record a generation drawn with an adapter of the dataset; returns its name."""
        name = f"{PARENT}/generations/one"
        with self.catalog.transaction() as session:
            session.add(ModelRow(name=f"{PARENT}/models/lace", project=PROJECT))
            session.add(
                GenerationRow(
                    name=name,
                    project=PROJECT,
                    request={},
                    base="bases/other",
                    state="SUCCEEDED",
                )
            )
            session.flush()
            session.add(
                ModelVersionRow(
                    name=MODEL_VERSION,
                    model=f"{PARENT}/models/lace",
                    number=1,
                    adapter_type="lora",
                    artifact="projects/studio/models/lace/versions/1/job",
                    digest="d" * 64,
                    base="bases/other",
                    dataset_version=VERSION,
                    dataset_digest="d" * 64,
                    trigger_word="<lace>",
                    config={},
                    final_loss=0.1,
                    reproduction_difference=0.0,
                    code_version="1",
                    files=[],
                    job=f"{PARENT}/jobs/train",
                )
            )
            session.flush()
            session.add(
                GenerationAdapterRow(producer=name, model_version=MODEL_VERSION, weight=weight)
            )
        return name


@contextlib.asynccontextmanager
async def running_platform(
    home: Path, build: Callable[[Settings], Service], **settings: Any
) -> AsyncIterator[Platform]:
    """Start a service over fake models and a fresh catalog and store."""
    async with running_models() as (models, address):
        chosen = Settings(home=home, inference_address=address, grace_seconds=0.2, **settings)
        catalog, store = open_catalog(chosen), open_store(chosen)
        catalog.migrate()
        with catalog.transaction() as session:
            for name in (chosen.default_base, "bases/other"):
                session.add(
                    BaseRow(
                        name=name,
                        artifact=f"{name}/0123",
                        digest=hashlib.sha256(name.encode()).hexdigest(),
                        native_size=NATIVE_SIZE,
                    )
                )
        service = await start(build(chosen), chosen)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{service.port}")
        try:
            yield Platform(chosen, catalog, store, models, service, channel)
        finally:
            await channel.close()
            await service.stop()
            catalog.close()


def png(pixels: np.ndarray) -> bytes:
    """Pixels as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def garment(
    colour: tuple[int, int, int],
    *,
    size: tuple[int, int] = (96, 96),
    backdrop: tuple[int, int, int] = (240, 240, 238),
) -> np.ndarray:
    """A shirt of rectangles on a backdrop, slightly shaded; size is width and height."""
    width, height = size
    pixels = np.empty((height, width, 3), dtype=np.float64)
    pixels[:] = backdrop
    shading = 0.85 + 0.3 * np.linspace(0, 1, height)[:, None, None]
    cloth = np.asarray(colour) * shading
    top, bottom = height // 6, height - height // 6
    arms = height // 2
    pixels[top:bottom, width // 4 : width - width // 4] = cloth[top:bottom]
    pixels[top:arms, width // 12 : width - width // 12] = cloth[top:arms]
    return np.clip(pixels, 0, 255).astype(np.uint8)
