"""Images that an epoch shows several times."""

from collections import Counter
from collections.abc import Callable

import pytest
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.core.errors import InvalidArgumentError
from toile.training import noise_prediction
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint
from toile.training.repeats import repeat_counts
from unit.training.runs import CONFIG, Run

SOURCES = ["look/a.jpg", "look/b.jpg", "detail/c.jpg", "detail/d.jpg"]


def test_patterns_count_by_imported_names() -> None:
    assert repeat_counts({"detail/*": 4, "look/b.*": 2}, SOURCES, recipe="lora") == [1, 2, 4, 4]
    assert repeat_counts({}, SOURCES, recipe="lora") == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("repeats", "field", "reason"),
    [
        ({"Detail/*": 4}, "lora.repeats.Detail/*", "REPEATS_MATCH_NOTHING"),
        ({"detail/*": 4, "*/c.jpg": 2}, "lora.repeats.*/c.jpg", "REPEATS_OVERLAP"),
    ],
)
def test_patterns_that_say_nothing_or_too_much(
    repeats: dict[str, int], field: str, reason: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        repeat_counts(repeats, SOURCES, recipe="lora")
    assert (caught.value.metadata["field"], caught.value.reason) == (field, reason)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gathers the places of the images that runs are shown."""
    seen: list[int] = []
    make_batch = noise_prediction.make_batch

    def watch(cache: Cache, indices: list[int], *rest: object) -> object:
        seen.extend(indices)
        return make_batch(cache, indices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(noise_prediction, "make_batch", watch)
    return seen


def test_every_epoch_shows_each_image_as_often_as_was_said(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    shown: list[int],
) -> None:
    Run(make_unet(), cache, scheduler, CONFIG, repeats=[1, 3, 1, 1])
    assert len(shown) == 12
    for epoch in (shown[:6], shown[6:]):
        assert Counter(epoch) == {0: 1, 1: 3, 2: 1, 3: 1}
    assert shown[:6] != shown[6:]


def test_held_out_images_are_not_repeated(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    shown: list[int],
) -> None:
    config = CONFIG.model_copy(update={"validation_share": 0.25})
    Run(make_unet(), cache, scheduler, config, repeats=[2, 2, 2, 2])
    assert set(Counter(shown).values()) == {4}
    assert len(Counter(shown)) == 3


def test_an_interruption_loses_no_place_in_the_epoch(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    kept: list[Checkpoint] = []
    repeats = [1, 3, 1, 2]
    whole = Run(make_unet(), cache, scheduler, CONFIG, repeats=repeats, keep=kept.append)
    rest = Run(make_unet(), cache, scheduler, CONFIG, kept[0], repeats=repeats)
    assert whole.end.to_files() == rest.end.to_files()
    once = Run(make_unet(), cache, scheduler, CONFIG, repeats=[1] * 4)
    plain = Run(make_unet(), cache, scheduler, CONFIG)
    assert once.end.to_files() == plain.end.to_files() != whole.end.to_files()
