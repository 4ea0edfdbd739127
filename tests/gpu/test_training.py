"""Trainings compute on the GPU, and what they publish is redrawn from its files there."""

import functools
from pathlib import Path

import pytest
import torch

from integration.training_platform import control_request_of, prepare, request_of, settings_for
from toile.core.artifacts import open_store
from toile.core.catalog.engine import open_catalog
from toile.core.jobs import JobState, JobStore
from toile.core.jobs.runtime import execute
from toile.train.handler import TrainHandler
from toile.training.run import train_and_publish

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("make_request", [request_of, control_request_of])
def test_a_training_on_the_gpu_becomes_a_version(
    device: torch.device,
    tiny_bundle: Path,
    tmp_path: Path,
    make_request: functools.partial,
    precision: str,
) -> None:
    settings = settings_for(tmp_path / "home", "")
    prepare(settings, tiny_bundle)
    catalog = open_catalog(settings)
    jobs = JobStore(catalog)
    request = make_request(steps=4, sample_prompts=["a lace dress"], mixed_precision=precision)
    row = TrainHandler(settings, catalog, open_store(settings)).create(request)
    jobs.next_attempt(row.name, after=0)
    torch.cuda.reset_peak_memory_stats()
    assert execute(functools.partial(train_and_publish, device=device), settings, row.name, 1) == 0
    ended = jobs.get(row.name)
    catalog.close()
    assert (ended.state, ended.error_message) == (JobState.SUCCEEDED, "")
    assert torch.cuda.max_memory_allocated() > 20 << 20, "the UNet was not there"
