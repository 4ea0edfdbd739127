"""A loss that counts the garment."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from toile.core.errors import DataLossError, FailedPreconditionError
from toile.training import batches, lora
from toile.training.batches import loss_sum, make_batch
from toile.training.caches import Cache, WeightedCache
from toile.training.config import LoraRecipeConfig
from toile.training.data import Example
from toile.training.masks import garment_shares, loss_weights, with_masks
from unit.training.runs import CONFIG, NAMES, Run

INSIDE = (slice(None), slice(None), slice(4, 12), slice(4, 12))
TIME_IDS = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])


def masked(cache: Cache, background: float) -> WeightedCache:
    """The same examples; a garment is in the middle of each."""
    shares = torch.zeros(len(NAMES), 1, 16, 16)
    shares[INSIDE] = 1.0
    return WeightedCache(**vars(cache), weights=loss_weights(shares, background))


def test_weights_are_one_on_average_whatever_the_garment_covers() -> None:
    shares = torch.zeros(3, 1, 4, 4)
    shares[0, :, :2] = 1.0
    shares[1, :, 0, 0] = 0.5
    weights = loss_weights(shares, 0.2)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(3))
    assert float(weights[0, 0, 3, 0] / weights[0, 0, 0, 0]) == pytest.approx(0.2)
    assert float(weights[1, 0, 1, 1] / weights[1, 0, 0, 0]) == pytest.approx(0.2 / 0.6)
    assert torch.equal(weights[2], torch.ones(1, 4, 4)), "without a garment all of it counts"
    assert torch.equal(loss_weights(shares, 1.0), torch.ones(3, 1, 4, 4))
    assert torch.equal(loss_weights(shares, 0.0)[0, 0, 2:], torch.zeros(2, 4))


def gradients(
    unet: UNet2DConditionModel,
    cache: Cache,
    scheduler: DDPMScheduler,
    changed: Tensor,
) -> list[Tensor]:
    """Of the LoRA, where the target is another by what `changed` says."""
    batch = make_batch(cache, [0, 1], CONFIG, 0, scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "prediction_target", lambda _, __, noise, ___: noise + changed)
        loss_sum(unet, batch, scheduler, CONFIG, TIME_IDS).backward()
    found = [p.grad.clone() for p in unet.parameters() if p.grad is not None]
    unet.zero_grad()
    return found


@pytest.mark.parametrize(("background", "counts"), [(0.0, False), (0.1, True)])
def test_a_background_of_no_weight_changes_no_gradient(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    background: float,
    counts: bool,
) -> None:
    unet = make_unet()
    lora.add_adapter(unet, CONFIG)
    inside = torch.zeros(2, 4, 16, 16)
    inside[INSIDE] = 5.0
    outside = 5.0 - inside
    weighted = masked(cache, background)
    usual = gradients(unet, weighted, scheduler, torch.zeros(()))
    assert any(tensor.abs().sum() > 0 for tensor in usual)
    other = gradients(unet, weighted, scheduler, outside)
    assert all(map(torch.equal, usual, other)) is not counts
    assert not all(map(torch.equal, usual, gradients(unet, weighted, scheduler, inside)))


def test_with_an_even_error_the_loss_is_the_same(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scale of the loss, and with it the learning rate that suits, is that of no mask."""
    monkeypatch.setattr(batches, "prediction_target", lambda _, __, noise, ___: noise * 0.0 + 1e4)
    unet, caches = make_unet(), (cache, masked(cache, 0.0), masked(cache, 0.3))
    with torch.no_grad():
        drawn = [make_batch(c, [0, 1], CONFIG, 0, scheduler) for c in caches]
        losses = [float(loss_sum(unet, batch, scheduler, CONFIG, TIME_IDS)) for batch in drawn]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_a_masked_run_trains_validates_and_resumes(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    config = CONFIG.model_copy(
        update={"validation_share": 0.25, "gradient_accumulation_steps": 2, "batch_size": 3}
    )
    weighted, kept = masked(cache, 0.0), []
    whole = Run(make_unet(), weighted, scheduler, config, keep=kept.append)
    rest = Run(make_unet(), weighted, scheduler, config, kept[0])
    assert whole.end.to_files() == rest.end.to_files()
    plain = Run(make_unet(), cache, scheduler, config)
    even = Run(make_unet(), masked(cache, 1.0), scheduler, config)
    assert even.end.losses == plain.end.losses != whole.end.losses
    assert even.end.validations == plain.end.validations != whole.end.validations


def test_ranks_share_the_weights(cache: Cache, scheduler: DDPMScheduler) -> None:
    weighted = masked(cache, 0.0)
    weighted.weights[2] = 3.0
    whole = make_batch(weighted, [0, 2, 1], CONFIG, 5, scheduler)
    odd = make_batch(weighted, [0, 2, 1], CONFIG, 5, scheduler, rank=1, world_size=2)
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor[1::2], vars(odd)[name])
    assert torch.equal(odd.weights, torch.full((1, 1, 16, 16), 3.0))  # type: ignore[attr-defined]


@pytest.fixture
def one(cache: Cache) -> Cache:
    """The first example alone."""
    of_all = {"embeds": cache.embeds, "pooled": cache.pooled}
    return Cache(cache.means[:1], cache.deviations[:1], cache.captions[:1], **of_all)


def example(mask: Path | None) -> list[Example]:
    return [Example(Path("a.png"), "a.png", "<lace> dress", "a.jpg", mask)]


def test_masks_are_scaled_by_area_and_cropped_as_images_are(one: Cache, tmp_path: Path) -> None:
    labels = np.zeros((64, 80), dtype=np.uint8)
    labels[:, 8:42] = 3  # the left 34 of the middle square's 64 columns: 8.5 of 16 latents
    mask = Image.fromarray(labels)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 0])
    mask.save(tmp_path / "m.png")
    shares = garment_shares(example(tmp_path / "m.png"), 128)
    weights = with_masks(one, shares, LoraRecipeConfig(masked_loss=True))
    row = weights.weights[0, 0, 5]
    expected = torch.tensor([1.0] * 8 + [0.5] + [0.0] * 7)
    torch.testing.assert_close(row, expected / expected.mean())


def test_versions_whose_masks_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        garment_shares(example(None), 128)
    assert caught.value.reason == "DATASET_LACKS_MASKS"
    assert caught.value.metadata["field"] == "lora.masked_loss"
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "colours.png")
    for name in ("bad.png", "colours.png"):
        with pytest.raises(DataLossError, match=name):
            garment_shares(example(tmp_path / name), 128)
