from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from toile.diffusion.architecture import NATIVE_SIZE, VAE_CONFIG
from toile.imaging.renderer.vocabulary import GARMENTS
from toile.training.tiny_base.config import RecipeConfig, StageConfig
from toile.training.tiny_base.data import load_renders, write_renders
from toile.training.tiny_base.evaluate import EVALUATED_COLOURS, held_out_prompts, held_out_renders
from toile.training.tiny_base.loop import averaged_state, learning_rate, run_stage
from toile.training.tiny_base.vae import to_tensor
from toile.training.tiny_base.vae_start import start_linear

_STAGE = StageConfig(steps=8, batch_size=4, learning_rate=0.05, warmup_steps=2)


def _train(workdir: Path, *, stop_at: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Linear(3, 1)

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (network(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()

    return run_stage("line", network, loss, _STAGE, workdir, checkpoint_seconds=0.0)


def test_a_stage_stopped_in_the_middle_ends_with_the_weights_of_one_that_was_not(tmp_path):
    whole = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "stopped", stop_at=5)
    _train(tmp_path / "stopped")
    for name, tensor in averaged_state(tmp_path / "stopped", "line").items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_a_stage_that_never_ran_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="'unet'"):
        averaged_state(tmp_path, "unet")


def test_the_rate_rises_then_falls_to_almost_nothing():
    rates = [learning_rate(_STAGE, step) for step in range(_STAGE.steps + 1)]
    assert rates[0] < rates[1] == max(rates)
    assert rates[-1] <= 0.02 * max(rates)


def test_a_stage_without_steps_is_refused():
    with pytest.raises(ValueError, match="positive"):
        StageConfig(steps=0, batch_size=1, learning_rate=1.0)


def test_renders_are_written_once_and_read_back_with_their_captions(tmp_path):
    config = RecipeConfig(workdir=tmp_path, threads=1, render_shards=2, renders_per_shard=3)
    write_renders(config)
    pictures = load_renders(config)
    assert pictures.images.shape == (6, NATIVE_SIZE, NATIVE_SIZE, 3)
    assert pictures.labels.shape == (6, NATIVE_SIZE, NATIVE_SIZE)
    assert pictures.images.std() > 10
    assert pictures.caption(0, np.random.default_rng(0)) in pictures.records[0]["captions"]
    kept = (tmp_path / "renders" / "000.json").stat().st_mtime_ns
    write_renders(config)
    assert (tmp_path / "renders" / "000.json").stat().st_mtime_ns == kept


def test_the_autoencoder_starts_as_the_mean_colour_of_every_block():
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE_CONFIG).eval()
    start_linear(vae)
    images = to_tensor(np.stack([drawn.image for drawn in held_out_renders(2)]))
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    blocks = torch.nn.functional.avg_pool2d(images, 8)
    assert (torch.nn.functional.avg_pool2d(decoded, 8) - blocks).abs().mean() < 0.05


def test_held_out_prompts_cover_every_colour_of_every_garment():
    asked = held_out_prompts(len(EVALUATED_COLOURS) * len(GARMENTS))
    assert len({(colour, category) for _, colour, category in asked}) == len(asked)
    assert all(colour in prompt and category in prompt for prompt, colour, category in asked)
