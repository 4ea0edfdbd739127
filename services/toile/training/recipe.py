"""What sets one recipe apart from another; the loop and the publishing are the same for all."""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from toile.core.artifacts import ArtifactStore
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.bundle import Bundle


class Recipe(abc.ABC):
    """One run's adapter: how it is trained, drawn with, and kept.

    Attributes:
        network: What the loop trains: predicts as the base's UNet does.
    """

    network: nn.Module

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Be done with training: what is drawn with from now on is what will be published."""

    @abc.abstractmethod
    def trained(self, index: int) -> Mapping[str, Any]:
        """Fields of the `DiffusionRequest` that draws a sample with the weights in memory."""

    @abc.abstractmethod
    def exported(self, folder: Path, bundle: Bundle, index: int) -> Mapping[str, Any]:
        """The same, with a version's files, loaded afresh as the server loads them.

        Raises:
            InvalidArgumentError: They cannot be used.
        """

    @abc.abstractmethod
    def export(self, folder: Path, card: AdapterCard) -> None:
        """Write the adapter's files into the folder of a version."""

    def judged(
        self,
        samples: Sequence[Image.Image],  # noqa: ARG002 - for those that override it
        without: Callable[[int], Image.Image],  # noqa: ARG002
    ) -> Mapping[str, bytes]:
        """Files, by their paths in the version, that say how well the samples came out.

        Args:
            samples: Drawn with the adapter.
            without: Draws a sample again, but without the adapter.
        """
        return {}

    def pack(  # noqa: B027
        self, store: ArtifactStore, prefix: str, folder: Path, targets: str
    ) -> None:
        """Store what engines want of the version at `prefix`, if they want something.

        Args:
            store: Where to.
            prefix: The version's.
            folder: Its files.
            targets: What engines take adapters for, by the settings' name.
        """
