"""An adapter's strength over the noise schedule."""

import pytest
import torch

from toile.diffusion.adapters import AdapterWeights, LoraLayer
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.shipped import shipped_bundle_path

RAMP = ((0.25, 0.0), (0.75, 2.0))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path())


@pytest.mark.parametrize(
    ("timestep", "weight"), [(999, 0.0), (750, 0.0), (500, 1.0), (375, 1.5), (250, 2.0), (0, 2.0)]
)
def test_points_are_joined_by_lines_and_their_ends_hold(timestep: float, weight: float) -> None:
    adapter = LoadedAdapter("a", AdapterWeights({}), 7.0, RAMP)
    assert adapter.weight_at(timestep) == pytest.approx(weight)


def test_without_a_schedule_the_weight_holds() -> None:
    assert LoadedAdapter("a", AdapterWeights({}), 0.7).weight_at(500) == 0.7


def test_each_evaluation_has_the_strength_of_its_timestep(bundle: Bundle) -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = bundle.unet.get_submodule(path).in_features
    layer = LoraLayer(torch.randn(4, width), torch.randn(width, 4), 4.0)
    weights = AdapterWeights({path: layer})
    denoiser = TorchDenoiser(bundle, bfloat16=False)
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 77, 256),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 128),
            "time_ids": torch.full((2, 6), 128.0),
        },
    }

    def predict(adapter: LoadedAdapter, timestep: int) -> torch.Tensor:
        with torch.inference_mode(), denoiser.session([adapter]) as unet:
            return unet(timestep=torch.tensor(timestep), **inputs).sample

    scheduled = LoadedAdapter("a", weights, schedule=RAMP)
    for timestep, weight in ((900, 0.0), (500, 1.0), (100, 2.0)):
        expected = predict(LoadedAdapter("a", weights, weight), timestep)
        assert torch.allclose(predict(scheduled, timestep), expected, atol=1e-6)
    assert not torch.allclose(
        predict(scheduled, 100), predict(LoadedAdapter("a", weights, 0.0), 100), atol=1e-3
    )
