"""Drawing images with diffusers' stock SDXL pipelines over a bundle's shared parts.

A request gets its own pipeline objects and its own scheduler; networks are shared. Each image
has a generator of its own on the CPU, so an image depends on its seed and not on its
neighbours.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

from PIL import Image

from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import Denoiser
from toile.diffusion.drawing import Drawing, encode_prompts
from toile.diffusion.progress import Listener, OnPreview, OnStep, Progress
from toile.diffusion.request import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    DiffusionRequest,
    RefinerMode,
)
from toile.diffusion.schedulers import make_scheduler
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.diffusion.upscale import tile_corners, upscale

__all__ = [
    "DEFAULT_GUIDANCE_SCALE",
    "DEFAULT_STEPS",
    "DiffusionRequest",
    "OnPreview",
    "OnStep",
    "diffuse",
    "draw_images",
]


def diffuse(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    *,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
) -> Iterator[Image.Image]:
    """Draw the request's images, in the order of its seeds.

    The denoiser is held for one image at a time, so that requests take turns.

    Args:
        bundle: The base.
        denoiser: What evaluates the base's UNets.
        request: What to draw.
        on_step: Told of each step, the refiner's included.
        on_preview: Shown the image so far, every `preview_interval` steps.

    Raises:
        CancelledError: The request's urgency said so; within one step.
        DeadlineError: The request's deadline is past; within one step.
        InvalidArgumentError: The prompt is too long or its emphasis means nothing, the size does
            not fit the repeat, the scheduler is unknown, or an adapter is of another base.
        FailedPreconditionError: A refiner is asked of a base that has none.
    """
    draw = _prepare(bundle, denoiser, request, Listener(on_step, on_preview))
    for index in range(len(request.seeds)):
        yield draw(index)


def draw_images(
    bundle: Bundle,
    denoiser: Denoiser,
    request: DiffusionRequest,
    on_image: Callable[[int, Image.Image], None],
    *,
    at_once: int,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
) -> None:
    """Draw the request's images like `diffuse`, several at once where they share evaluations.

    Each image's events keep their order; those of different images mix, and come from several
    threads. When one image fails, the others stop within a step.

    Args:
        bundle: The base.
        denoiser: What evaluates the base's UNets; it says how many samples it takes together.
        request: What to draw.
        on_image: Given each image with its index, as soon as it is done.
        at_once: Most images at once.
        on_step: Told of each step, the refiner's included.
        on_preview: Shown the image so far, every `preview_interval` steps.

    Raises:
        ToileError: See `diffuse`.
    """
    width, height = request.image_size(bundle.native_size)
    samples = denoiser.samples_at_once(height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    guided = request.guidance_scale > 1
    lanes = max(1, min(at_once, samples // (2 if guided else 1), len(request.seeds)))
    failed = threading.Event()
    failures: list[BaseException] = []
    wanted = request.urgency
    urgency = replace(wanted, cancelled=lambda: failed.is_set() or wanted.cancelled())
    listener = Listener(on_step, on_preview)
    draw = _prepare(bundle, denoiser, replace(request, urgency=urgency), listener)

    def draw_one(index: int) -> None:
        try:
            on_image(index, draw(index))
        except BaseException as error:
            failures.append(error)  # before the others fail for it
            failed.set()
            raise

    with ThreadPoolExecutor(lanes, thread_name_prefix="images") as pool:
        futures = [pool.submit(draw_one, index) for index in range(len(request.seeds))]
        wait(futures)
    if failures:
        raise failures[0]


def _prepare(
    bundle: Bundle, denoiser: Denoiser, request: DiffusionRequest, listener: Listener
) -> Callable[[int], Image.Image]:
    """Return what draws the image of an index, once all mistakes that can be found are."""
    request.image_size(bundle.native_size)
    singles = [request.of_image(index) for index in range(len(request.seeds))]
    for single in {one.prompt: one for one in singles}.values():
        encode_prompts(bundle, single)
        if request.refiner_strength:
            encode_prompts(bundle, single, refiner=True)
    total = _steps_in_all(bundle, request)

    def draw(index: int) -> Image.Image:
        single = singles[index]
        progress = Progress(single, index, total, listener)
        progress.check()
        # An enlarged image repeats as a whole; its tiles do not.
        each = single if single.upscale is None else replace(single, repeat=None)
        drawing = Drawing(bundle, denoiser, each, single.seeds[0], progress)
        return _draw(bundle, single, drawing)

    return draw


def _draw(bundle: Bundle, request: DiffusionRequest, drawing: Drawing) -> Image.Image:
    if request.upscale is not None:
        return upscale(drawing, request, bundle.native_size)
    if request.init_image is None:
        return drawing.from_noise()
    size = request.image_size(bundle.native_size)
    start = request.init_image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if request.mask_image is None:
        return drawing.from_image(start)
    mask = request.mask_image.convert("L").resize(size, Image.Resampling.BILINEAR)
    return drawing.inside_mask(start, mask)


def _steps_in_all(bundle: Bundle, request: DiffusionRequest) -> int:
    """Count the calls of the UNets for one image; some schedulers make two a step."""
    scheduler = make_scheduler(request.scheduler, bundle.scheduler_config)
    scheduler.set_timesteps(request.steps)
    calls: int = len(scheduler.timesteps)

    def redrawn(strength: float) -> int:
        """Count those of an image-to-image pipeline."""
        skipped = request.steps - min(int(request.steps * strength), request.steps)
        return calls - skipped * int(scheduler.order)

    if request.upscale is not None:
        size = (request.height, request.width)
        corners = tile_corners(size, bundle.native_size, request.upscale.overlap, request.repeat)
        return len(corners) * redrawn(request.strength)
    if request.init_image is not None:
        return redrawn(request.strength)
    if not request.refiner_strength:
        return calls
    if request.refiner_mode is RefinerMode.IMAGE_TO_IMAGE:
        return calls + redrawn(request.refiner_strength)
    # As the stock pipelines cut: a refiner never begins in the middle of a double step.
    trained = scheduler.config.num_train_timesteps
    fine = int((scheduler.timesteps < round(trained * request.refiner_strength)).sum())
    return calls + int(scheduler.order == 2 and fine % 2 == 0)
