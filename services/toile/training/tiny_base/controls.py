"""Stage `controls`: a ControlNet that is shown the edges of a picture."""

from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

from toile.diffusion.architecture import NATIVE_SIZE
from toile.imaging.edges import canny
from toile.training.controlnet import ControlledUNet, new_controlnet
from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    prediction_target,
    weighted_error,
)
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures
from toile.training.tiny_base.loop import averaged_state, run_stage
from toile.training.tiny_base.unet import Draw, Sampler, load_unet

STAGE = "controls"
KIND = "edges"


def train_controls(config: RecipeConfig) -> ControlNetModel:
    """Train the ControlNet beside the finished UNet, on all timesteps.

    Half of the captions are dropped, so that it learns to read the map where no prompt helps
    (as in the paper, section 3.3).
    """
    network = ControlledUNet(load_unet(config, "unet"), _new(config))
    sampler = Sampler(config, seed=106, batch_size=config.controls.batch_size)
    size = float(NATIVE_SIZE)
    time_ids = torch.tensor([size, size, 0.0, 0.0, size, size])

    def loss(step: int) -> Tensor:
        draw = sampler.draw(step, max_timestep=1000)
        first, second, pooled = sampler.conditioner(draw.captions)
        rng = np.random.default_rng([config.seed, 107, step, sampler.rank])
        keep = torch.from_numpy(rng.random(len(draw.captions)) >= config.controls_caption_dropout)
        keep = keep[:, None].to(first.dtype)
        noisy = add_noise(sampler.scheduler, draw.latents, draw.noise, draw.timesteps)
        predicted = network(
            noisy,
            draw.timesteps,
            maps=edge_maps(draw),
            encoder_hidden_states=torch.cat([first, second], dim=2) * keep[..., None],
            added_cond_kwargs={
                "text_embeds": pooled * keep,
                "time_ids": time_ids.expand(len(keep), -1),
            },
        )[0]
        target = prediction_target(sampler.scheduler, draw.latents, draw.noise, draw.timesteps)
        weights = min_snr_weights(sampler.scheduler, draw.timesteps, config.min_snr_gamma)
        return weighted_error(predicted, target, weights)

    run_stage(
        STAGE,
        network,
        loss,
        config.controls,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return load_controls(config)


def load_controls(config: RecipeConfig) -> ControlNetModel:
    """The averaged ControlNet."""
    network = ControlledUNet(load_unet(config, "unet"), _new(config))
    network.load_state_dict(averaged_state(config.workdir, STAGE))
    trained: ControlNetModel = network.controlnet
    return trained.eval().requires_grad_(False)


def edge_maps(draw: Draw) -> Tensor:
    """Edges of a batch's pictures, `[B, 3, S, S]`, 0 to 1."""
    edges = np.stack([canny(_picture(source, index)) for source, index in draw.pictures])
    maps = torch.from_numpy(edges.astype(np.float32) / 255.0)
    return maps[:, None].expand(-1, 3, -1, -1)


def _picture(source: Pictures, index: int) -> Any:
    return np.ascontiguousarray(source.images[index])


def _new(config: RecipeConfig) -> ControlNetModel:
    return new_controlnet(load_unet(config, "unet"), seed=config.seed)
