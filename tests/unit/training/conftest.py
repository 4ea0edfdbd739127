"""A network small enough to train in a test, and a platform to train on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from integration.training_platform import control_request_of, prepared, request_of
from toile.core.artifacts import ArtifactStore, open_store
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import JobRow
from toile.core.jobs import JobStore
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import Settings
from toile.diffusion.pipelines import DiffusionRequest
from toile.train.handler import TrainHandler
from toile.training import publish
from toile.training.caches import Cache
from unit.training import runs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """The same small UNet of the tiny base's kind, again and again."""
    return runs.small_unet


@pytest.fixture
def cache() -> Cache:
    """Encoded examples, made up."""
    return runs.made_up_cache()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return runs.base_scheduler()


@pytest.fixture
def quick_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two denoising steps are as good as twenty to tell two files apart."""

    def request(**arguments: object) -> DiffusionRequest:
        return DiffusionRequest(steps=2, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "DiffusionRequest", request)


@pytest.fixture
def settings(tmp_path: Path, tiny_bundle: Path) -> Settings:
    return prepared(tmp_path / "home", tiny_bundle)


@pytest.fixture
def catalog(settings: Settings) -> Iterator[Catalog]:
    catalog = open_catalog(settings)
    yield catalog
    catalog.close()


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


@pytest.fixture
def train(settings: Settings, catalog: Catalog, store: ArtifactStore) -> Callable[..., JobRow]:
    """Run a training with some work in the place of a worker."""

    def train(
        work: Callable[[JobContext], None], recipe: str = "lora", **changes: object
    ) -> JobRow:
        handler, jobs = TrainHandler(settings, catalog, store), JobStore(catalog)
        config = {"steps": 4, "checkpoint_interval_steps": 2, **changes}
        if recipe == "controlnet":
            row = handler.create(control_request_of(**config))
        else:
            row = handler.create(request_of(**{"sample_prompts": ["a lace dress"], **config}))
        jobs.next_attempt(row.name, after=0)
        assert execute(work, settings, row.name, 1) == 0
        return jobs.get(row.name)

    return train
