import pytest
import torch
from diffusers import DDPMScheduler

from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    prediction_target,
    signal_to_noise,
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
