"""Stages `latents`, `unet` and `refiner`: the denoisers, on latents computed once."""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from toile.diffusion.architecture import (
    NATIVE_SIZE,
    REFINER_CONFIG,
    SCHEDULER_CONFIG,
    UNET_CONFIG,
)
from toile.diffusion.tokenizer import MAX_TOKENS
from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    prediction_target,
    weighted_error,
)
from toile.training.tiny_base.clip import TrainedTrio, load_clip, load_tokenizer
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures, load_photographs, load_renders
from toile.training.tiny_base.loop import (
    Snapshot,
    averaged_state,
    half_precision,
    run_stage,
    workers,
)
from toile.training.tiny_base.vae import load_vae, to_tensor

AESTHETIC_SCORE = 6.0
_ENCODE_BATCH = 16
_ENCODE_CHUNK = 1000


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents `[N, 4, h, w]` and the pictures they came from."""

    latents: Tensor
    pictures: Pictures


class Conditioner:
    """Prompts to what a UNet is conditioned on, as the SDXL pipelines compute it."""

    def __init__(self, trio: TrainedTrio, tokenizer: CLIPTokenizer) -> None:
        self.trio, self.tokenizer = trio, tokenizer

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of both encoders `[B, 77, w1]`, `[B, 77, w2]`, and the pooled `[B, p]`."""
        token_ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        first = self.trio.text_encoder(input_ids=token_ids, output_hidden_states=True)
        second = self.trio.text_encoder_2(input_ids=token_ids, output_hidden_states=True)
        return first.hidden_states[-2], second.hidden_states[-2], second.text_embeds


def write_latents(config: RecipeConfig) -> None:
    """Encode every render and photograph once, in chunks; chunks already written are kept."""
    folder = config.workdir / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    load_vae(config).save_pretrained(folder / "vae")
    tasks = []
    for name, pictures in (("renders", load_renders(config)), ("photos", load_photographs(config))):
        tasks += [
            (config, name, start)
            for start in range(0, len(pictures.images), _ENCODE_CHUNK)
            if not (folder / f"{name}-{start:06d}.safetensors").exists()
        ]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=config.threads, mp_context=spawned) as pool:
        list(pool.map(_encode_chunk, tasks))


def _encode_chunk(task: tuple[RecipeConfig, str, int]) -> None:
    config, name, start = task
    torch.set_num_threads(1)
    folder = config.workdir / "latents"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pictures = load_renders(config) if name == "renders" else load_photographs(config)
    stop = min(start + _ENCODE_CHUNK, len(pictures.images))
    encoded = []
    with torch.inference_mode(), half_precision():
        for row in range(start, stop, _ENCODE_BATCH):
            batch = to_tensor(pictures.images[row : min(row + _ENCODE_BATCH, stop)])
            encoded.append(vae.encode(batch).latent_dist.mean.float())
    latents = torch.cat(encoded) * float(vae.config.scaling_factor)
    part = folder / f"{name}-{start:06d}.part"
    save_file({"latents": latents.half().contiguous()}, part)
    part.replace(part.with_suffix(".safetensors"))


def train_unet(config: RecipeConfig, snapshot: Snapshot | None = None) -> UNet2DConditionModel:
    """Train the base's UNet on all timesteps."""
    torch.manual_seed(config.seed)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    sampler = Sampler(config, seed=104, batch_size=config.unet.batch_size)
    size = float(NATIVE_SIZE)
    time_ids = torch.tensor([size, size, 0.0, 0.0, size, size])

    def loss(step: int) -> Tensor:
        draw = sampler.draw(step, max_timestep=1000)
        first, second, pooled = sampler.conditioner(draw.captions)
        keep = draw.keep[:, None].to(first.dtype)
        return denoising_loss(
            config,
            sampler.scheduler,
            unet,
            draw,
            torch.cat([first, second], dim=2) * keep[..., None],
            {"text_embeds": pooled * keep, "time_ids": time_ids.expand(len(keep), -1)},
        )

    run_stage(
        "unet",
        unet,
        loss,
        config.unet,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
        snapshot=snapshot,
    )
    return load_unet(config, "unet")


def train_refiner(config: RecipeConfig) -> UNet2DConditionModel:
    """Train the refiner's UNet on the last, least noisy part of the schedule."""
    torch.manual_seed(config.seed)
    unet = UNet2DConditionModel(**REFINER_CONFIG)
    sampler = Sampler(config, seed=105, batch_size=config.refiner.batch_size)
    size = float(NATIVE_SIZE)
    time_ids = torch.tensor([size, size, 0.0, 0.0, AESTHETIC_SCORE])

    def loss(step: int) -> Tensor:
        draw = sampler.draw(step, max_timestep=config.refiner_max_timestep)
        # Unlike the base, SDXL's refiner is unconditioned by an encoded empty prompt.
        captions = [c if kept else "" for c, kept in zip(draw.captions, draw.keep, strict=True)]
        _, second, pooled = sampler.conditioner(captions)
        return denoising_loss(
            config,
            sampler.scheduler,
            unet,
            draw,
            second,
            {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)},
        )

    run_stage(
        "refiner",
        unet,
        loss,
        config.refiner,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return load_unet(config, "refiner")


def load_unet(config: RecipeConfig, stage: str) -> UNet2DConditionModel:
    """The averaged UNet of the stage `unet` or `refiner`."""
    unet = UNet2DConditionModel(**(UNET_CONFIG if stage == "unet" else REFINER_CONFIG))
    unet.load_state_dict(averaged_state(config.workdir, stage))
    unet.eval().requires_grad_(False)
    return unet


@dataclass(frozen=True)
class Draw:
    """One batch: latents and noise `[B, 4, h, w]`, timesteps `[B]`, captions, and keep `[B]`.

    pictures says where each came from: a set of pictures, and the place in it.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    keep: Tensor
    pictures: list[tuple[Pictures, int]]


class Sampler:
    """Draws batches; everything random comes from the step's number and the worker's rank."""

    def __init__(self, config: RecipeConfig, *, seed: int, batch_size: int) -> None:
        self.rank, count = workers()
        self.config, self.seed, self.batch_size = config, seed, batch_size // count
        self.scheduler = EulerDiscreteScheduler(**SCHEDULER_CONFIG)
        self.conditioner = Conditioner(load_clip(config), load_tokenizer(config))
        self.sources = _latent_sets(config)

    def draw(self, step: int, *, max_timestep: int) -> Draw:
        """The batch of a step."""
        rng = np.random.default_rng([self.config.seed, self.seed, step, self.rank])
        shares = np.array([share for _, share in self.sources])
        latents, captions, pictures = [], [], []
        for choice in rng.choice(len(self.sources), size=self.batch_size, p=shares / shares.sum()):
            source = self.sources[int(choice)][0]
            index = int(rng.integers(len(source.latents)))
            latents.append(source.latents[index])
            captions.append(source.pictures.caption(index, rng))
            pictures.append((source.pictures, index))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        clean = torch.stack(latents)
        # Spread evenly over the schedule, so that one batch sees all noise levels.
        spread = (np.arange(self.batch_size) + rng.random(self.batch_size)) / self.batch_size
        timesteps = torch.from_numpy((spread * max_timestep).astype(np.int64))
        return Draw(
            clean,
            torch.randn(clean.shape, generator=generator),
            timesteps.clamp(0, max_timestep - 1),
            captions,
            torch.from_numpy(rng.random(self.batch_size) >= self.config.condition_dropout),
            pictures,
        )


def _latent_sets(config: RecipeConfig) -> list[tuple[LatentSet, float]]:
    """Renders and, where there are any, photographs, each with its share of a batch."""
    share = config.photo_share_unet
    sets = [(_latent_set(config, "renders", load_renders(config)), 1.0 - share)]
    photos = load_photographs(config)
    if len(photos.images):
        sets.append((_latent_set(config, "photos", photos), share))
    return sets


def _latent_set(config: RecipeConfig, name: str, pictures: Pictures) -> LatentSet:
    files = sorted((config.workdir / "latents").glob(f"{name}-*.safetensors"))
    latents = torch.cat([load_file(file)["latents"] for file in files]).float()
    if len(latents) != len(pictures.records):
        raise FileNotFoundError(f"latents of the {name} are incomplete; run the stage `latents`")
    return LatentSet(latents, pictures)


def denoising_loss(
    config: RecipeConfig,
    scheduler: EulerDiscreteScheduler,
    unet: Callable[..., Any],
    draw: Draw,
    hidden_states: Tensor,
    added: Mapping[str, Tensor],
) -> Tensor:
    """The loss of a batch, for what predicts as a UNet does under these conditions."""
    noisy = add_noise(scheduler, draw.latents, draw.noise, draw.timesteps)
    predicted = unet(
        noisy,
        draw.timesteps,
        encoder_hidden_states=hidden_states,
        added_cond_kwargs=dict(added),
    ).sample
    target = prediction_target(scheduler, draw.latents, draw.noise, draw.timesteps)
    weights = min_snr_weights(scheduler, draw.timesteps, config.min_snr_gamma)
    return weighted_error(predicted, target, weights)
