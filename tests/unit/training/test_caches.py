"""Caches of a training: computed once, in shards, by whoever is there."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.catalog.models import JobRow
from toile.core.errors import CancelledError, DataLossError
from toile.core.jobs.runtime import JobContext
from toile.core.settings import Settings
from toile.diffusion.bundle import Bundle
from toile.training import cache_maker, cache_plans, stage
from toile.training.cache_maker import CacheMaker
from toile.training.cache_plans import EXAMPLES, CachePlan, inputs, plans_for
from toile.training.config import MASKS
from toile.training.data import read_examples
from unit.training.runs import CLASS_CONFIG, CONTROL_CONFIG

Train = Callable[..., JobRow]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four examples make two shards."""
    monkeypatch.setattr(cache_plans, "_SHARD_EXAMPLES", 3)


@pytest.fixture
def in_a_job(train: Train) -> Callable[[Callable[[JobContext], object]], None]:
    """Do something in a job that needs latents, embeddings and masks."""

    def run(work: Callable[[JobContext], object]) -> None:
        done = []

        def then_stop(job: JobContext) -> None:
            work(job)
            done.append(True)
            raise CancelledError("enough")

        row = train(then_stop, masked_loss=True)
        assert done, row.error_message

    return run


@pytest.fixture
def maker_for(settings: Settings, tiny_bundle: Path) -> Callable[[JobContext], CacheMaker]:
    def make(job: JobContext) -> CacheMaker:
        bundle = Bundle.load(tiny_bundle, digest=inputs(job)[0].digest)
        return CacheMaker(job, bundle, read_examples(settings.home_path / "version"), tells=True)

    return make


def plans_of(job: JobContext) -> dict[str, CachePlan]:
    return {plan.kind: plan for plan in plans_for(job, *inputs(job))}


def kept(store: ArtifactStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("projects/p/caches/")}


def test_an_actor_keeps_the_very_bytes_that_a_worker_alone_does(
    in_a_job: Callable[..., None],
    maker_for: Callable[[JobContext], CacheMaker],
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "NICENESS", 0)
    monkeypatch.setattr(stage.core_logging, "configure", lambda *_: None)

    def work(job: JobContext) -> None:
        plans, maker = plans_of(job), maker_for(job)
        torch.set_num_threads(2)
        alone = {kind: maker.obtain(plan) for kind, plan in plans.items()}
        assert torch.get_num_threads() == 2
        files = kept(store)
        assert len(files) == 2 * (2 + 1), "two shards and a manifest of each"
        for key in files:
            store.delete(key)

        torch.set_num_threads(1)
        actor = stage.MakeShard(job.settings, job.name, job.attempt, gpus=0)
        for shard in (1, 0):  # in whatever order
            for kind in (EXAMPLES, MASKS):
                actor({"kind": np.array([kind]), "shard": np.array([shard])})
        actor._opened.close()
        stage.fill_caches(job, actors=2, gpus=0)  # nothing is left to compute: no Ray is needed
        assert kept(store) == files
        again = {kind: maker_for(job).obtain(plan) for kind, plan in plans.items()}
        assert all(same(again[kind], alone[kind]) for kind in plans)

    in_a_job(work)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_shards_make_up_one_cache_and_a_caption_is_encoded_once(
    in_a_job: Callable[..., None], maker_for: Callable[[JobContext], CacheMaker]
) -> None:
    def work(job: JobContext) -> None:
        found = maker_for(job).obtain(plans_of(job)[EXAMPLES])
        assert found["means"].shape == found["deviations"].shape == (4, 4, 16, 16)
        assert found["captions"].tolist() == [1, 2, 1, 2]
        assert len(found["embeds"]) == len(found["pooled"]) == 3, "the empty caption's, and two"
        assert not torch.equal(found["embeds"][0], found["embeds"][1])

    in_a_job(work)


def test_a_cache_is_computed_once_and_an_interrupted_one_goes_on(
    in_a_job: Callable[..., None],
    maker_for: Callable[[JobContext], CacheMaker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, computed = cache_maker.encode, []

    def watched(
        bundle: Bundle, examples: object, places: range, *rest: object, **how: bool
    ) -> object:
        computed.append(places)
        if len(computed) == 2:
            raise CancelledError("the job was paused")
        return encode(bundle, examples, places, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_maker, "encode", watched)

    def work(job: JobContext) -> None:
        plan = plans_of(job)[EXAMPLES]
        with pytest.raises(CancelledError):
            maker_for(job).obtain(plan)
        assert not plan.is_published(job)
        first = maker_for(job).obtain(plan)
        assert computed == [range(3), range(3, 4), range(3, 4)]
        assert same(maker_for(job).obtain(plan), first)
        assert len(computed) == 3, "nothing is computed again"

    in_a_job(work)


def test_damage_here_is_mended_and_damage_in_the_store_costs_a_computation(
    in_a_job: Callable[..., None],
    maker_for: Callable[[JobContext], CacheMaker],
    store: ArtifactStore,
) -> None:
    def work(job: JobContext) -> None:
        plan = plans_of(job)[EXAMPLES]
        whole = maker_for(job).obtain(plan)
        folder = job.cache_path / read_manifest(store, plan.prefix).digest
        (folder / plan.names[0]).write_bytes(b"no tensors")
        assert same(maker_for(job).obtain(plan), whole)

        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        store.delete(f"{plan.prefix}/{plan.names[1]}")
        store.put(f"{plan.prefix}/{plan.names[1]}", b"other bytes")
        with pytest.raises(DataLossError):
            maker_for(job).obtain(plan)
        assert same(maker_for(job).obtain(plan), whole)

    in_a_job(work)


def test_what_a_cache_follows_from_is_in_its_name() -> None:
    base = SimpleNamespace(digest="b", native_size=128)
    dataset = SimpleNamespace(digest="d", image_count=40)
    parts = CONTROL_CONFIG.model_copy(update={"control_kind": "parts"})

    def prefixes(config: object, **changes: object) -> list[str]:
        b = SimpleNamespace(**{**vars(base), **changes})
        return [plan.prefix for plan in cache_plans._plans("p", config, b, dataset)]  # type: ignore[arg-type]

    more = CLASS_CONFIG.model_copy(update={"class_image_count": 4})
    other = CLASS_CONFIG.model_copy(update={"class_prompt": "a skirt"})
    found = [prefixes(config)[-1] for config in (CONTROL_CONFIG, parts, CLASS_CONFIG, more, other)]
    found += [
        prefixes(CLASS_CONFIG, **changes)[0]
        for changes in ({}, {"digest": "c"}, {"native_size": 256})
    ]
    as_tokens = CLASS_CONFIG.model_copy(update={"train_text_encoders": True, "masked_loss": True})
    found += [*prefixes(as_tokens)[::2]]
    assert len(set(found)) == len(found)
    with_masks = CLASS_CONFIG.model_copy(update={"masked_loss": True})
    assert prefixes(as_tokens)[1] == prefixes(with_masks)[1], "masks say nothing of captions"
    (examples, *_) = cache_plans._plans("p", CLASS_CONFIG, base, dataset)  # type: ignore[arg-type]
    assert [len(places) for places in examples.shards] == [3] * 13 + [1]
    assert len(examples.names) == 14
