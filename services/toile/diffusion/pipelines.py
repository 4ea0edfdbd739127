"""Drawing images with diffusers' stock SDXL pipelines over a bundle's shared parts.

A request gets its own pipeline objects and its own scheduler; networks are shared. Each image
has a generator of its own on the CPU, so an image depends on its seed and not on its
neighbours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from toile.core.errors import CancelledError, InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import NO_HURRY, Denoiser, LoadedAdapter, Urgency
from toile.diffusion.schedulers import make_scheduler

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 5.0

OnStep = Callable[[int, int, int], None]
"""Called with the image's index, steps done and steps in all, after each step."""


@dataclass(frozen=True)
class DiffusionRequest:
    """Images to draw. With `init_image` the drawing starts from it, else from noise."""

    prompt: str
    seeds: Sequence[int]
    """One for each image."""
    negative_prompt: str = ""
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance; at most 1 turns it off."""
    width: int = 0
    """Pixels, a multiple of 8; the base's native size, or the init image's, when 0."""
    height: int = 0
    adapters: Sequence[LoadedAdapter] = ()
    scheduler: str = ""
    refiner_strength: float = 0.0
    """Share of the schedule that the refiner redraws; 0 for none."""
    init_image: Image.Image | None = None
    mask_image: Image.Image | None = None
    """White where the image may change; outside it stays as it is, to the pixel."""
    strength: float = 1.0
    """Share of the schedule to redraw of an init image, above 0 to 1."""
    urgency: Urgency = NO_HURRY

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise _invalid("steps must be at least 1", "steps")
        if not math.isfinite(self.guidance_scale):
            raise _invalid("guidance_scale must be finite", "guidance_scale")
        if not 0 <= self.refiner_strength < 1:
            raise _invalid("refiner_strength must be from 0 to below 1", "refiner_strength")
        if self.mask_image is not None and self.init_image is None:
            raise _invalid("a mask needs an image to start from", "mask_image")
        if self.mask_image is not None and self.init_image is not None:
            if self.mask_image.size != self.init_image.size:
                raise _invalid("the mask and the image differ in size", "mask_image")
            if not self.mask_image.convert("L").point(lambda value: value > 127).getbbox():
                raise _invalid("the mask is black: nothing may change", "mask_image")
        if self.init_image is not None and self.refiner_strength:
            raise _invalid("the refiner stage needs a drawing from noise", "refiner_strength")
        if self.init_image is not None and int(self.steps * self.strength) < 1:
            raise _invalid(
                f"strength {self.strength} leaves none of {self.steps} steps", "strength"
            )
        for field in ("width", "height"):
            if getattr(self, field) % 8:
                raise _invalid(f"{field} must be a multiple of 8", field)


def diffuse(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    *,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Image.Image]:
    """Draw the request's images, in the order of its seeds.

    The denoiser is held for one image at a time, so that requests take turns.

    Args:
        bundle: The base.
        denoiser: What evaluates the base's UNets.
        request: What to draw.
        on_step: Told of each step, the refiner's included.
        cancelled: Asked after each step.

    Raises:
        CancelledError: `cancelled` said so; within one step.
        DeadlineError: The request's deadline is past; within one step.
        InvalidArgumentError: The prompt is too long, the scheduler unknown, or an adapter is
            of another base.
        FailedPreconditionError: A refiner is asked of a base that has none.
    """
    size = _size(bundle, request)
    embeddings = bundle.encode_prompt(request.prompt, request.negative_prompt)
    if request.refiner_strength:  # find mistakes before anything is drawn
        bundle.encode_prompt(request.prompt, request.negative_prompt, refiner=True)
    for index, seed in enumerate(request.seeds):
        progress = _Progress(index, _steps_in_all(bundle, request), on_step, request, cancelled)
        progress.check()
        arguments = {
            **embeddings.arguments(1),
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.steps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "callback_on_step_end": progress,
        }
        if request.init_image is not None:
            yield _redraw(bundle, denoiser, request, size, arguments)
        elif request.refiner_strength:
            yield _draw_and_refine(bundle, denoiser, request, size, arguments)
        else:
            yield _draw(bundle, denoiser, request, size, arguments)


class _Progress:
    """The pipelines' `callback_on_step_end`, counting over all stages of one image."""

    def __init__(
        self,
        index: int,
        total: int,
        on_step: OnStep | None,
        request: DiffusionRequest,
        cancelled: Callable[[], bool],
    ) -> None:
        self._index, self._total, self._done = index, total, 0
        self._on_step, self._urgency, self._cancelled = on_step, request.urgency, cancelled

    def check(self) -> None:
        if self._cancelled():
            raise CancelledError("the drawing was cancelled")
        self._urgency.check()

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        del pipeline, step, timestep
        self._done += 1
        if self._on_step is not None:
            self._on_step(self._index, self._done, self._total)
        self.check()
        return tensors


@torch.inference_mode()
def _draw(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    size: tuple[int, int],
    arguments: dict[str, Any],
) -> Image.Image:
    with denoiser.session(request.adapters, request.urgency) as unet:
        pipeline = _pipeline(StableDiffusionXLPipeline, bundle, unet, request.scheduler)
        latents = pipeline(width=size[0], height=size[1], output_type="latent", **arguments).images
    return _decode(bundle, pipeline, latents)


@torch.inference_mode()
def _draw_and_refine(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    size: tuple[int, int],
    arguments: dict[str, Any],
) -> Image.Image:
    """Split the schedule: the base draws its first part and the refiner, on latents, the rest."""
    split = 1.0 - request.refiner_strength
    with denoiser.session(request.adapters, request.urgency) as unet:
        pipeline = _pipeline(StableDiffusionXLPipeline, bundle, unet, request.scheduler)
        latents = pipeline(
            width=size[0], height=size[1], denoising_end=split, output_type="latent", **arguments
        ).images
    prompts = bundle.encode_prompt(request.prompt, request.negative_prompt, refiner=True)
    with denoiser.refiner_session(request.urgency) as unet:
        refiner = _refiner(bundle, unet, request.scheduler)
        latents = refiner(
            **{**arguments, **prompts.arguments(1)},
            image=latents,
            denoising_start=split,
            original_size=(size[1], size[0]),
            target_size=(size[1], size[0]),
            output_type="latent",
        ).images
    return _decode(bundle, refiner, latents)


@torch.inference_mode()
def _redraw(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    size: tuple[int, int],
    arguments: dict[str, Any],
) -> Image.Image:
    assert request.init_image is not None  # noqa: S101 - diffuse() has seen to it
    start = request.init_image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    arguments = {**arguments, "image": start, "strength": request.strength}
    if request.mask_image is None:
        with denoiser.session(request.adapters, request.urgency) as unet:
            plain = _pipeline(StableDiffusionXLImg2ImgPipeline, bundle, unet, request.scheduler)
            latents = plain(output_type="latent", **arguments).images
        return _decode(bundle, plain, latents)
    mask = request.mask_image.convert("L").resize(size, Image.Resampling.BILINEAR)
    with denoiser.session(request.adapters, request.urgency) as unet:
        inpaint = _pipeline(StableDiffusionXLInpaintPipeline, bundle, unet, request.scheduler)
        latents = inpaint(
            mask_image=mask, width=size[0], height=size[1], output_type="latent", **arguments
        ).images
    drawn = _decode(bundle, inpaint, latents)
    # The VAE does not give the outside back exactly, so it is taken from the image itself.
    return Image.composite(drawn, start, mask)


def _pipeline(cls: Any, bundle: Bundle, unet: UNet2DConditionModel, scheduler: str) -> Any:
    """Make a stock pipeline for one request. Prompts come encoded: no text encoder is needed."""
    pipeline = cls(
        vae=bundle.vae,
        text_encoder=None,
        text_encoder_2=bundle.text_encoder_2,  # asked for the width of its projection
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=make_scheduler(scheduler, bundle.scheduler_config),
        force_zeros_for_empty_prompt=bundle.zeros_for_empty_negative,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _refiner(bundle: Bundle, unet: UNet2DConditionModel, scheduler: str) -> Any:
    pipeline = _pipeline(StableDiffusionXLImg2ImgPipeline, bundle, unet, scheduler)
    pipeline.register_to_config(requires_aesthetics_score=bundle.refiner_wants_aesthetics)
    return pipeline


def _decode(bundle: Bundle, pipeline: Any, latents: torch.Tensor) -> Image.Image:
    """Turn latents `[1, 4, H/8, W/8]` into an image; outside of the denoiser's session."""
    vae = bundle.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    mean, deviation = vae.config.latents_mean, vae.config.latents_std
    if mean is not None and deviation is not None:
        latents = latents * latents.new_tensor(deviation).view(1, -1, 1, 1)
        latents = latents + latents.new_tensor(mean).view(1, -1, 1, 1)
    decoded = vae.decode(latents, return_dict=False)[0]
    image: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return image


def _size(bundle: Bundle, request: DiffusionRequest) -> tuple[int, int]:
    if request.init_image is not None:
        own = tuple(max(8, round(side / 8) * 8) for side in request.init_image.size)
    else:
        own = (bundle.native_size, bundle.native_size)
    return request.width or own[0], request.height or own[1]


def _steps_in_all(bundle: Bundle, request: DiffusionRequest) -> int:
    """Count the calls of the UNets for one image; some schedulers make two a step."""
    scheduler = make_scheduler(request.scheduler, bundle.scheduler_config)
    scheduler.set_timesteps(request.steps)
    calls: int = len(scheduler.timesteps)
    if request.init_image is not None:
        skipped = request.steps - min(int(request.steps * request.strength), request.steps)
        return calls - skipped * int(scheduler.order)
    if request.refiner_strength:
        # As the stock pipelines cut: a refiner never begins in the middle of a double step.
        trained = scheduler.config.num_train_timesteps
        fine = int((scheduler.timesteps < round(trained * request.refiner_strength)).sum())
        return calls + int(scheduler.order == 2 and fine % 2 == 0)
    return calls


def _invalid(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field=field)
