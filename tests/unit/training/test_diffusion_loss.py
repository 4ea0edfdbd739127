import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    offset_noise,
    prediction_target,
    signal_to_noise,
    squared_or_huber,
    weighted_error,
)

_KINDS = ("epsilon", "v_prediction", "sample")


def _scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)


@pytest.mark.parametrize("kind", _KINDS)
def test_noise_and_targets_are_those_of_diffusers_own_scheduler(kind):
    scheduler = _scheduler(kind)
    torch.manual_seed(0)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([5, 500, 990])
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": scheduler.get_velocity(latents, noise, timesteps),
    }[kind]
    torch.testing.assert_close(
        add_noise(scheduler, latents, noise, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
    )
    torch.testing.assert_close(prediction_target(scheduler, latents, noise, timesteps), expected)


def test_min_snr_weighs_the_same_clean_sample_error_alike_for_every_prediction_type():
    timesteps = torch.tensor([10, 300, 900])
    ratio = signal_to_noise(_scheduler("epsilon"), timesteps)
    in_terms_of_sample = {
        "epsilon": min_snr_weights(_scheduler("epsilon"), timesteps) * ratio,
        "v_prediction": min_snr_weights(_scheduler("v_prediction"), timesteps) * (ratio + 1),
        "sample": min_snr_weights(_scheduler("sample"), timesteps),
    }
    for weights in in_terms_of_sample.values():
        torch.testing.assert_close(weights, ratio.clamp(max=5.0))


def test_a_weight_of_zero_silences_its_sample():
    target = torch.zeros(2, 4, 2, 2)
    predicted = torch.stack([torch.ones(4, 2, 2), 100 * torch.ones(4, 2, 2)])
    assert weighted_error(predicted, target, torch.tensor([1.0, 0.0])).item() == pytest.approx(0.5)


def test_an_unknown_prediction_type_is_refused():
    scheduler = _scheduler("epsilon")
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="score"):
        prediction_target(scheduler, *torch.zeros(2, 1, 4, 2, 2), torch.tensor([1]))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_trainers(gamma: float) -> None:
    """`examples/text_to_image/train_text_to_image_lora_sdxl.py`."""
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(_scheduler("epsilon"), timesteps)
    capped = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    torch.testing.assert_close(
        min_snr_weights(_scheduler("epsilon"), timesteps, gamma), capped / snr
    )
    torch.testing.assert_close(
        min_snr_weights(_scheduler("v_prediction"), timesteps, gamma), capped / (snr + 1)
    )


def test_v_prediction_weighs_nothing_where_no_signal_is_left() -> None:
    """The last step of a schedule with zero terminal signal has a signal-to-noise ratio of 0."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert min_snr_weights(scheduler, torch.tensor([999])).item() == pytest.approx(0.0, abs=1e-6)


def test_offset_moves_whole_channels() -> None:
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = offset_noise(noise, 0.1, torch.Generator().manual_seed(1)) - noise
    drawn = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved, (0.1 * drawn).expand(4, 8, 8))


def test_without_an_offset_nothing_is_drawn() -> None:
    source = torch.Generator().manual_seed(1)
    noise = torch.zeros(4, 8, 8)
    assert offset_noise(noise, 0.0, source) is noise
    assert torch.equal(source.get_state(), torch.Generator().manual_seed(1).get_state())


def test_pseudo_huber_is_squared_when_small_and_linear_when_large() -> None:
    small, large = torch.tensor([1e-2, -1e-2]), torch.tensor([100.0, -100.0])
    torch.testing.assert_close(squared_or_huber(small, 1.0), small**2, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(
        squared_or_huber(large, 0.5), 2 * 0.5 * large.abs(), rtol=1e-2, atol=0.0
    )
    assert torch.equal(squared_or_huber(large, 0.0), large**2)


def test_pseudo_huber_is_the_formula_of_the_trainers_and_exact_for_small_errors() -> None:
    errors = torch.linspace(-3, 3, 101)
    formula = 2 * 0.3 * ((errors.double() ** 2 + 0.3**2).sqrt() - 0.3)
    torch.testing.assert_close(squared_or_huber(errors, 0.3), formula.float())
    tiny = torch.tensor([1e-4])
    torch.testing.assert_close(squared_or_huber(tiny, 10.0), tiny**2, atol=0.0, rtol=1e-6)


def test_pseudo_huber_is_steepest_at_twice_its_constant() -> None:
    errors = torch.linspace(-50, 50, 101, requires_grad=True)
    squared_or_huber(errors, 0.5).sum().backward()
    assert errors.grad is not None
    assert errors.grad.abs().max().item() == pytest.approx(1.0, abs=1e-3)
