"""The models behind `InferenceService`, without Ray: loaded by artifact, kept while in use."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import torch
from PIL import Image

from toile.core.artifacts import ArtifactStore, fetch_patiently
from toile.core.errors import InvalidArgumentError
from toile.core.kept import Kept
from toile.core.settings import Settings
from toile.diffusion.adapters import AdapterWeights, linear_targets, load_lora
from toile.diffusion.banked_unet import TARGETS, bank_layout
from toile.diffusion.bundle import CPU, Bundle
from toile.diffusion.denoiser import Denoiser, LoadedAdapter
from toile.diffusion.pipelines import DiffusionRequest, OnStep, diffuse, draw_images
from toile.diffusion.request import RefinerMode, UpscaleTiles
from toile.diffusion.triton.packed import empty_unet
from toile.diffusion.triton.unloading import unload_adapter
from toile.diffusion.turns import Turns, Urgency
from toile.diffusion.vision import Vision
from toile.imaging import decode, formats, png
from toile.imaging.formats import ImageFormat
from toile.imaging.seams import Repeat
from toile.serving.controls import ControlNets
from toile.serving.denoisers import open_denoiser
from toile.v1 import common_pb2, inference_pb2

BASES_IN_MEMORY = 2
ADAPTER_BYTES_IN_MEMORY = 512 << 20
PREVIEW_QUALITY = 80

E = TypeVar("E", bound=IntEnum)


@dataclass
class LoadedBase:
    """A base with what draws and what sees."""

    bundle: Bundle
    targets: Mapping[str, tuple[int, int]]
    """Its UNet's Linears: (in, out) by module path."""
    denoiser: Denoiser
    vision: Vision
    seeing: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """Everything that is asked of the models; methods may be called from several threads.

    A base, an adapter or a ControlNet is named by its artifact, fetched once into the cache
    folder, verified, and kept in memory until others push it out.
    """

    def __init__(
        self, settings: Settings, store: ArtifactStore, *, device: torch.device = CPU
    ) -> None:
        """Make it; nothing is loaded yet.

        Args:
            settings: Limits, the cache folder, and where Triton is.
            store: Of bases and adapters.
            device: Where networks are, but for UNets that Triton has.
        """
        self._device = device
        self._ends = TARGETS[settings.engine.targets]
        self._limits = settings.limits
        self._cache = settings.home_path / "cache"
        self._settings = settings
        self._store = store
        self._bases: Kept[str, LoadedBase] = Kept(BASES_IN_MEMORY)
        self._adapters: Kept[str, AdapterWeights] = Kept(
            ADAPTER_BYTES_IN_MEMORY, lambda weights: weights.size_bytes
        )
        self._controlnets = ControlNets(settings.limits, store, self._cache)
        self._turns = Turns(
            settings.limits.running_generations, waiting_limit=settings.limits.queued_generations
        )

    def warm_up(self, base_artifact: str) -> None:
        """Load a base and run each of its networks once."""
        base = self._base(base_artifact)
        size = base.bundle.native_size
        request = DiffusionRequest("", [0], steps=1, width=size, height=size)
        image = next(diffuse(base.bundle, base.denoiser, request))
        with base.seeing:
            base.vision.describe(image)

    def diffuse(
        self,
        request: inference_pb2.DiffuseRequest,
        *,
        on_step: OnStep,
        on_image: Callable[[int, bytes], None],
        on_preview: Callable[[int, int, bytes], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Draw images when it is their turn, each as PNG to `on_image` when it is done.

        Previews go to `on_preview` as JPEG, with the image's index and the steps done. Where images
        are drawn at once, all three are called by several threads.

        Raises:
            CancelledError: `cancelled` said so.
            DeadlineError: The request's time is over.
            NotFoundError: There is no such base, adapter or ControlNet.
            InvalidArgumentError: The request asks for what cannot be drawn.
            FailedPreconditionError: The base lacks what is asked of it.
            ExhaustedError: As many as may already wait.
        """
        urgency = _urgency(request, cancelled)
        with self._turns.turn(urgency):
            self._draw(request, urgency, on_step, on_image, on_preview)

    def _draw(
        self,
        request: inference_pb2.DiffuseRequest,
        urgency: Urgency,
        on_step: OnStep,
        on_image: Callable[[int, bytes], None],
        on_preview: Callable[[int, int, bytes], None],
    ) -> None:
        base = self._base(request.base_artifact)
        drawing = self._drawing(base, request, urgency)

        def show(index: int, step: int, preview: Image.Image) -> None:
            jpeg = formats.encode(preview, ImageFormat.JPEG, quality=PREVIEW_QUALITY)
            on_preview(index, step, jpeg)

        draw_images(
            base.bundle,
            base.denoiser,
            drawing,
            lambda index, image: on_image(index, png.encode(image)),
            at_once=self._limits.images_at_once,
            on_step=on_step,
            on_preview=show,
        )

    def embed_images(self, base_artifact: str, images: Sequence[bytes]) -> list[list[float]]:
        """Return one CLIP embedding of unit length for each encoded image."""
        base = self._base(base_artifact)
        decoded = [self._seen(data) for data in images]
        with base.seeing:
            return [[float(v) for v in row] for row in base.vision.embed_images(decoded)]

    def embed_texts(self, base_artifact: str, texts: Sequence[str]) -> list[list[float]]:
        """Return one CLIP embedding of unit length for each text."""
        base = self._base(base_artifact)
        with base.seeing:
            return [[float(v) for v in row] for row in base.vision.embed_texts(texts)]

    def segment(self, base_artifact: str, image: bytes) -> tuple[bytes, list[str]]:
        """Return a greyscale PNG whose pixels index labels, and the labels."""
        base = self._base(base_artifact)
        decoded = self._seen(image)
        with base.seeing:
            labels, names = base.vision.segment(decoded)
        return png.encode(Image.fromarray(labels)), names

    def describe(self, base_artifact: str, image: bytes) -> str:
        """Return a caption of an encoded image."""
        base = self._base(base_artifact)
        decoded = self._seen(image)
        with base.seeing:
            return base.vision.describe(decoded)

    def _seen(self, image: bytes) -> Image.Image:
        """Decode what is looked at and not drawn from: callers shrink it, maybe to a strip."""
        return decode.decode(image, self._limits, min_side_pixels=1)

    def forget_adapter(self, artifact: str) -> None:
        """Drop an adapter from memory, here and in Triton.

        Raises:
            ComputeUnavailableError: Triton does not answer.
        """
        self._adapters.drop(artifact)
        if self._settings.triton_address:
            unload_adapter(self._settings.triton_address, artifact)

    def _drawing(
        self, base: LoadedBase, request: inference_pb2.DiffuseRequest, urgency: Urgency
    ) -> DiffusionRequest:
        if not request.seeds:
            raise InvalidArgumentError("no seeds: no images", field="seeds")
        image = decode.decode(request.init_image, self._limits) if request.init_image else None
        mask = decode.decode(request.mask_image, self._limits) if request.mask_image else None
        return DiffusionRequest(
            prompt=request.prompt,
            prompts=list(request.prompts),
            seeds=list(request.seeds),
            negative_prompt=request.negative_prompt,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=request.width,
            height=request.height,
            adapters=[
                LoadedAdapter(
                    a.artifact,
                    self._adapter(base, a.artifact),
                    a.weight,
                    [(point.share, point.weight) for point in a.schedule],
                )
                for a in request.adapters
            ],
            scheduler=request.scheduler,
            refiner_strength=request.refiner_strength,
            init_image=image,
            mask_image=mask,
            strength=request.strength,
            urgency=urgency,
            guidance_rescale=request.guidance_rescale,
            preview_interval=request.preview_interval,
            repeat=_member(Repeat, request.repeat, "repeat") if request.repeat else None,
            upscale=(
                UpscaleTiles(request.upscale.overlap) if request.HasField("upscale") else None
            ),
            refiner_mode=_member(RefinerMode, request.refiner_mode or 1, "refiner_mode"),
            controls=[self._controlnets.load(base.bundle, c) for c in request.controls],
        )

    def _base(self, artifact: str) -> LoadedBase:
        def load() -> LoadedBase:
            folder = fetch_patiently(self._store, artifact, self._cache)
            # The folder is named after the manifest's digest, which is the base's.
            bundle = Bundle.load(folder, digest=folder.name, device=self._device)
            # On a CPU it decodes in three quarters of the time with channels innermost.
            bundle.vae.to(memory_format=torch.channels_last)
            unet = empty_unet(folder)
            layout = bank_layout(unet, self._ends)
            denoiser = open_denoiser(bundle, layout, self._store, self._settings)
            vision = Vision(folder, device=self._device)
            return LoadedBase(bundle, linear_targets(unet), denoiser, vision)

        return self._bases.get(artifact, load)

    def _adapter(self, base: LoadedBase, artifact: str) -> AdapterWeights:
        def load() -> AdapterWeights:
            return load_lora(
                fetch_patiently(self._store, artifact, self._cache), targets=base.targets
            )

        return self._adapters.get(artifact, load)


def _member(cls: type[E], number: int, field: str) -> E:
    try:
        return cls(number)
    except ValueError:
        raise InvalidArgumentError(f"{field} {number} is unknown", field=field) from None


def _urgency(request: inference_pb2.DiffuseRequest, cancelled: Callable[[], bool]) -> Urgency:
    seconds = request.timeout_seconds or math.inf
    return Urgency(
        priority=2 if request.priority == common_pb2.PRIORITY_BATCH else 1,
        deadline=time.monotonic() + seconds,
        cancelled=cancelled,
    )
