"""What is asked of the pipelines, checked when it is made."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from PIL import Image

from toile.core.errors import InvalidArgumentError
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import LoadedAdapter
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.diffusion.turns import NO_HURRY, Urgency
from toile.imaging.seams import Repeat

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 5.0
MAX_CONTROL_SCALE = 2.0


class RefinerMode(enum.IntEnum):
    """How the refiner takes over; numbers as in `toile.v1.RefinerMode`."""

    SPLIT = 1
    """The base draws the first part of the schedule, the refiner the rest."""
    IMAGE_TO_IMAGE = 2
    """The base draws the whole image; the refiner redraws it from some noise."""


@dataclass(frozen=True)
class UpscaleTiles:
    """How an image is enlarged."""

    overlap: int
    """Pixels that neighbouring tiles share, over which one fades into the next."""


@dataclass(frozen=True)
class DiffusionRequest:
    """Images to draw. With `init_image` the drawing starts from it, else from noise.

    Raises:
        InvalidArgumentError: A field is out of its range, or two do not go together; its metadata
            names the field.
    """

    prompt: str
    """In the syntax of `toile.core.prompts`; of all images, unless each has its own."""
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
    """Share of the schedule that the refiner redraws, below 1; 0 for none."""
    init_image: Image.Image | None = None
    mask_image: Image.Image | None = None
    """White where the image may change; outside it stays as it is, to the pixel."""
    strength: float = 1.0
    """Share of the schedule to redraw of an init image, above 0 to 1."""
    urgency: Urgency = NO_HURRY
    guidance_rescale: float = 0.0
    """How far guided predictions are rescaled to the spread of unguided ones, 0 to 1
    (https://arxiv.org/abs/2305.08891, section 3.4)."""
    preview_interval: int = 0
    """Steps between previews; 0 for none."""
    repeat: Repeat | None = None
    """Draw a tile whose copies meet on this lattice without a seam."""
    upscale: UpscaleTiles | None = None
    """Enlarge the init image to the size asked for, then redraw it tile by tile."""
    refiner_mode: RefinerMode = RefinerMode.SPLIT
    controls: Sequence[LoadedControl] = ()
    """ControlNets that hold the structure of a drawing from noise or from a whole image."""
    prompts: Sequence[str] = ()
    """One for each image, in place of `prompt`."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_controls()
        if self.init_image is None:
            for field in ("mask_image", "upscale"):
                if getattr(self, field) is not None:
                    raise _invalid(f"{field} needs an image to start from", field)
            return
        if not 0 < self.strength <= 1 or int(self.steps * self.strength) < 1:
            raise _invalid(
                f"strength {self.strength} leaves none of {self.steps} steps", "strength"
            )
        if self.refiner_strength:
            raise _invalid("the refiner stage needs a drawing from noise", "refiner_strength")
        if self.mask_image is not None:
            self._check_mask(self.init_image, self.mask_image)
        if self.upscale is not None and not (self.width and self.height):
            raise _invalid("an enlarged image needs a width and a height", "width", "BAD_SIZE")

    def of_image(self, index: int) -> Self:
        """Return the request for one of the images alone."""
        prompt = self.prompts[index] if self.prompts else self.prompt
        return replace(self, prompt=prompt, prompts=(), seeds=[self.seeds[index]])

    def _check_numbers(self) -> None:
        if self.prompts and len(self.prompts) != len(self.seeds):
            raise _invalid("there must be a prompt for each seed", "prompts")
        if self.steps < 1:
            raise _invalid("steps must be at least 1", "steps")
        if not math.isfinite(self.guidance_scale):
            raise _invalid("guidance_scale must be finite", "guidance_scale")
        if not 0 <= self.guidance_rescale <= 1:
            raise _invalid("guidance_rescale must be from 0 to 1", "guidance_rescale")
        if not 0 <= self.refiner_strength < 1:
            raise _invalid("refiner_strength must be from 0 to below 1", "refiner_strength")
        redrawn = self.refiner_strength and self.refiner_mode is RefinerMode.IMAGE_TO_IMAGE
        if redrawn and int(self.steps * self.refiner_strength) < 1:
            raise _invalid(
                f"refiner_strength {self.refiner_strength} leaves none of {self.steps} steps",
                "refiner_strength",
            )
        if self.preview_interval < 0:
            raise _invalid("preview_interval must not be negative", "preview_interval")
        if self.upscale is not None and self.upscale.overlap < 0:
            raise _invalid("overlap must not be negative", "upscale.overlap")
        for field in ("width", "height"):
            side = getattr(self, field)
            if side < 0 or side % PIXELS_PER_LATENT:
                raise _invalid(f"{field} must be a multiple of 8", field, "BAD_SIZE")

    def _check_controls(self) -> None:
        for field in ("mask_image", "upscale", "repeat"):
            if self.controls and getattr(self, field) is not None:
                raise _invalid(f"controls do not go together with {field}", "controls")
        for control in self.controls:
            if not (math.isfinite(control.scale) and 0 <= control.scale <= MAX_CONTROL_SCALE):
                raise _invalid("a control's scale must be from 0 to 2", "controls.scale")
            if not 0 <= control.start < control.end <= 1:
                raise _invalid("a control must start before it ends, from 0 to 1", "controls.start")

    def _check_mask(self, image: Image.Image, mask: Image.Image) -> None:
        if self.upscale is not None:
            raise _invalid("an image is enlarged as a whole", "mask_image")
        if mask.size != image.size:
            raise _invalid("the mask and the image differ in size", "mask_image")
        if not mask.convert("L").point(lambda value: value > 127).getbbox():
            raise _invalid("the mask is black: nothing may change", "mask_image")

    def image_size(self, native: int) -> tuple[int, int]:
        """Return the width and height to draw, in pixels, on a base of this native size.

        Raises:
            InvalidArgumentError: Half of a tile that repeats is not a whole number of latents
                (`BAD_SIZE`), or tiles share more than half of each other.
        """
        own = (native, native)
        if self.init_image is not None:
            width, height = self.init_image.size
            own = (max(1, round(width / 8)) * 8, max(1, round(height / 8)) * 8)
        size = self.width or own[0], self.height or own[1]
        halved = {Repeat.HALF_DROP: ("height", size[1]), Repeat.BRICK: ("width", size[0])}
        if self.repeat in halved:
            field, side = halved[self.repeat]
            if side % (2 * PIXELS_PER_LATENT):
                raise _invalid(
                    f"{field} must be a multiple of 16 for this repeat, not {side}",
                    field,
                    "BAD_SIZE",
                )
        if self.upscale is not None and self.upscale.overlap > native // 2:
            raise _invalid(
                f"overlap must be at most half a tile, {native // 2} pixels", "upscale.overlap"
            )
        return size


def _invalid(message: str, field: str, reason: str | None = None) -> InvalidArgumentError:
    return InvalidArgumentError(message, field=field, reason=reason)
