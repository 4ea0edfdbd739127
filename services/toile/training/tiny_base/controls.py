"""Stage `controls`: a ControlNet that is shown the edges of a picture."""

from functools import partial

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

from toile.diffusion.architecture import NATIVE_SIZE
from toile.imaging.edges import canny
from toile.training.controlnet import ControlledUNet, new_controlnet
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.loop import averaged_state, run_stage
from toile.training.tiny_base.unet import Draw, Sampler, denoising_loss, load_unet

STAGE = "controls"


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
        return denoising_loss(
            config,
            sampler.scheduler,
            partial(network, maps=edge_maps(draw), return_dict=True),
            draw,
            torch.cat([first, second], dim=2) * keep[..., None],
            {"text_embeds": pooled * keep, "time_ids": time_ids.expand(len(keep), -1)},
        )

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
    edges = np.stack([canny(source.images[index]) for source, index in draw.pictures])
    maps = torch.from_numpy(edges.astype(np.float32) / 255.0)
    return maps[:, None].expand(-1, 3, -1, -1)


def _new(config: RecipeConfig) -> ControlNetModel:
    return new_controlnet(load_unet(config, "unet"), seed=config.seed)
