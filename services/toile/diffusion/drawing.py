"""One image by diffusers' stock SDXL pipelines, from noise or from another image."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import Denoiser
from toile.diffusion.latents import decode, encode
from toile.diffusion.previews import Previewer, WatchedUNet, enlarge
from toile.diffusion.progress import Progress
from toile.diffusion.prompts import PromptEmbeddings
from toile.diffusion.repeats import RollingUNet
from toile.diffusion.request import DiffusionRequest, RefinerMode
from toile.diffusion.schedulers import make_scheduler
from toile.diffusion.sdxl import PIXELS_PER_LATENT


class Drawing:
    """What one image is drawn with: shared networks, and a generator of its own.

    Its randomness comes from the CPU, so an image depends on its seed and not on where it is
    drawn or beside what.

    Attributes:
        generator: Source of its noise.
        show: Turns a preview of what is being drawn into one of the whole image.
    """

    def __init__(
        self,
        bundle: Bundle,
        denoiser: Denoiser,
        request: DiffusionRequest,
        seed: int,
        progress: Progress,
    ) -> None:
        self._bundle, self._denoiser, self._request = bundle, denoiser, request
        self._size = request.image_size(bundle.native_size)
        self._progress = progress
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self._frames = torch.Generator("cpu").manual_seed(seed)
        # Fitted before a session is held, where it has to be fitted.
        self._previewer = bundle.previewer if progress.wants_previews else None
        self.show: Callable[[Image.Image], Image.Image] = lambda preview: preview

    @property
    def device(self) -> torch.device:
        """Where its latents are."""
        return self._bundle.device

    @property
    def latent_channels(self) -> int:
        """Channels of the base's latents."""
        return int(self._bundle.vae.config.latent_channels)

    @torch.inference_mode()
    def from_noise(self) -> Image.Image:
        """Draw from noise, and with the refiner where one is asked for."""
        request = self._request
        split = request.refiner_strength > 0 and request.refiner_mode is RefinerMode.SPLIT
        more: dict[str, Any] = {}
        if split:
            more["denoising_end"] = 1.0 - request.refiner_strength
        width, height = self._size
        with self._unet() as unet:
            pipeline = self._pipeline(StableDiffusionXLPipeline, unet)
            latents = pipeline(width=width, height=height, **self._arguments(), **more).images
        if request.refiner_strength:
            latents = self._refine(latents, split=split)
        return decode(self._bundle, latents, request.repeat)

    @torch.inference_mode()
    def from_image(self, start: Image.Image, noise: torch.Tensor | None = None) -> Image.Image:
        """Redraw an image by the request's strength.

        Args:
            start: RGB; its sides are multiples of 8.
            noise: What is added to its latents, `[1, 4, H/8, W/8]`; drawn when None.
        """
        request = self._request
        latents = encode(self._bundle, start, self.generator, request.repeat)
        more: dict[str, Any] = {"image": latents, "strength": request.strength}
        with self._unet() as unet:
            pipeline = self._pipeline(StableDiffusionXLImg2ImgPipeline, unet)
            if noise is not None:
                more["latents"] = self._noisy(pipeline, latents, noise)
            latents = pipeline(**self._arguments(), **more).images
        return decode(self._bundle, latents, request.repeat)

    @torch.inference_mode()
    def inside_mask(self, start: Image.Image, mask: Image.Image) -> Image.Image:
        """Redraw an image where the mask is white; both of the drawing's size."""
        request, (width, height) = self._request, self._size
        with self._unet() as unet:
            pipeline = self._pipeline(StableDiffusionXLInpaintPipeline, unet)
            latents = pipeline(
                image=start,
                mask_image=mask,
                strength=request.strength,
                width=width,
                height=height,
                **self._arguments(),
            ).images
        drawn = decode(self._bundle, latents, request.repeat)
        # The VAE does not give the outside back exactly, so it is taken from the image itself.
        return Image.composite(drawn, start, mask)

    def _refine(self, latents: torch.Tensor, *, split: bool) -> torch.Tensor:
        """Draw the rest of the schedule, or some of it again, on the base's latents."""
        request, (width, height) = self._request, self._size
        strength = request.refiner_strength
        share = {"denoising_start": 1.0 - strength} if split else {"strength": strength}
        with self._unet(refiner=True) as unet:
            refiner = self._pipeline(StableDiffusionXLImg2ImgPipeline, unet)
            refiner.register_to_config(
                requires_aesthetics_score=self._bundle.refiner_wants_aesthetics
            )
            refined: torch.Tensor = refiner(
                image=latents,
                original_size=(height, width),
                target_size=(height, width),
                **share,
                **self._arguments(refiner=True),
            ).images
        return refined

    def _noisy(self, pipeline: Any, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add noise as the pipeline would, which draws its own otherwise."""
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(self._request.steps, device=latents.device)
        timesteps, _ = pipeline.get_timesteps(
            self._request.steps, self._request.strength, latents.device
        )
        noisy: torch.Tensor = scheduler.add_noise(latents, noise, timesteps[:1])
        return noisy

    @contextlib.contextmanager
    def _unet(self, *, refiner: bool = False) -> Iterator[Any]:
        """Hold what the pipelines of this drawing take for their UNet."""
        with _session(self._denoiser, self._request, refiner=refiner) as unet:
            if self._request.repeat is not None:
                unet = RollingUNet(unet, self._request.repeat, self._frames)
            if self._previewer is not None:
                unet = self._watched(unet, self._previewer)
            yield unet

    def _watched(self, unet: Any, previewer: Previewer) -> WatchedUNet:
        scheduler = make_scheduler(self._request.scheduler, self._bundle.scheduler_config)
        watched = WatchedUNet(unet, scheduler, self._request.guidance_scale)

        def preview() -> Image.Image:
            assert watched.clean is not None  # noqa: S101 - asked for after a step
            return enlarge(self.show(previewer(watched.clean)), PIXELS_PER_LATENT)

        self._progress.preview = preview
        return watched

    def _pipeline(self, cls: Any, unet: Any) -> Any:
        """Make a stock pipeline. Prompts come encoded: no text encoder is needed."""
        bundle = self._bundle
        pipeline = cls(
            vae=bundle.vae,
            text_encoder=None,
            text_encoder_2=bundle.text_encoder_2,  # asked for the width of its projection
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=make_scheduler(self._request.scheduler, bundle.scheduler_config),
            force_zeros_for_empty_prompt=bundle.zeros_for_empty_negative,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _arguments(self, *, refiner: bool = False) -> dict[str, Any]:
        """Return what all pipelines are called with."""
        request = self._request
        return {
            **encode_prompts(self._bundle, request, refiner=refiner).arguments(1),
            "guidance_scale": request.guidance_scale,
            "guidance_rescale": request.guidance_rescale,
            "num_inference_steps": request.steps,
            "generator": self.generator,
            "callback_on_step_end": self._progress,
            "output_type": "latent",
        }


def encode_prompts(
    bundle: Bundle, request: DiffusionRequest, *, refiner: bool = False
) -> PromptEmbeddings:
    """Return the request's prompts for the base or its refiner; from the base's cache, mostly.

    A refiner is drawn with as it is, without adapters.
    """
    adapters = [] if refiner else [a for one in request.adapters if (a := one.text_adapter)]
    return bundle.encode_prompt(
        request.prompt, request.negative_prompt, refiner=refiner, adapters=adapters
    )


def _session(
    denoiser: Denoiser, request: DiffusionRequest, *, refiner: bool
) -> contextlib.AbstractContextManager[Any]:
    if refiner:
        return denoiser.refiner_session(request.urgency)
    return denoiser.session(request.adapters, request.urgency, request.controls)
