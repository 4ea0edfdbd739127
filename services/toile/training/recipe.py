"""What sets one recipe apart from another; the loop and the publishing are the same for all.

What is learned, and of what, is the `Objective` that is made with it.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import Denoiser
from toile.training.buckets import BucketedCache
from toile.training.caches import Cache
from toile.training.config import RecipeConfig
from toile.training.data import Example
from toile.training.noise_prediction import NoisePrediction


def reload_frozen(unet: UNet2DConditionModel, base: Path) -> None:
    """Give a UNet that is held in half precision its own weights again, in fp32.

    Args:
        unet: Whose parameters are all frozen but those of adapters.
        base: The folder of its base.
    """
    fresh = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    weights = fresh.state_dict()
    for name, parameter in unet.named_parameters():
        plain = name.replace(".base_layer.", ".")  # where peft has put the Linear
        if plain in weights:
            parameter.data = weights[plain].to(parameter.device)


@dataclass(frozen=True)
class Materials:
    """What a run has for its recipe."""

    bundle: Bundle
    examples: Sequence[Example]
    """The dataset's."""
    caches: Mapping[str, Mapping[str, Tensor]]
    """By kind, those of `cache_plans`."""
    targets: str
    """What engines take adapters for, by the settings' name."""

    def noise_prediction(
        self, cache: Cache | BucketedCache, config: RecipeConfig
    ) -> NoisePrediction:
        """Have the base's noise predicted on the dataset's examples, and others behind them."""
        return NoisePrediction(
            cache,
            DDPMScheduler.from_config(self.bundle.scheduler_config),
            config,
            image_count=len(self.examples),
            native_size=self.bundle.native_size,
        )


@dataclass(frozen=True)
class Served:
    """How a server draws."""

    denoiser: Denoiser
    fields: Mapping[str, Any]
    """Of the `DiffusionRequest`."""
    file: str
    """The file that it draws with, for who must be told of it."""


@dataclass(frozen=True)
class Judged:
    """How well the samples came out."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """By their paths in the version."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Some of `toile.v1.VersionMetrics`."""


class Recipe(abc.ABC):
    """One run's adapter: how it is trained, drawn with, and kept.

    Attributes:
        network: What the loop trains.
    """

    network: nn.Module

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Be done with training: what is drawn with from now on is what will be published."""

    @abc.abstractmethod
    def trained(self, index: int) -> Mapping[str, Any]:
        """Fields of the `DiffusionRequest` that draws a sample with the weights in memory."""

    @abc.abstractmethod
    def export(self, folder: Path, card: AdapterCard) -> None:
        """Write the adapter's files into the folder of a version."""

    def release(self) -> None:
        """Let go of what was trained, which is exported by then."""
        if hasattr(self, "network"):
            del self.network

    @abc.abstractmethod
    def check(self, folder: Path) -> None:
        """Refuse a version's files that other programs would not take.

        Raises:
            ToileError: One does not conform (`NOT_CONFORMANT`).
        """

    def pack(self, folder: Path, bank: Path) -> None:  # noqa: B027 - most need nothing packed
        """Write what engines want of a version's files, made of these files, into `bank`."""

    @abc.abstractmethod
    def served(self, folder: Path, bank: Path, bundle: Bundle, index: int) -> Served:
        """What a server draws a sample with, from a version's files alone.

        Args:
            folder: The version's files.
            bank: What `pack` wrote.
            bundle: The base, loaded afresh.
            index: Of the sample.

        Raises:
            ToileError: The files cannot be used.
        """

    def judged(
        self,
        samples: Sequence[Image.Image],  # noqa: ARG002 - for those that override it
        without: Callable[[int], Image.Image],  # noqa: ARG002
    ) -> Judged:
        """Say how well the samples came out.

        Args:
            samples: Drawn with the adapter.
            without: Draws a sample again, but without the adapter.
        """
        return Judged()
