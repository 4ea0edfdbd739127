"""Drawing in this process as an engine does: adapters come packed, as inputs of one network."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from toile.core.errors import FailedPreconditionError
from toile.diffusion.bank import BankLayout, PackedAdapter, gather
from toile.diffusion.banked_unet import BankedUNet
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import LoadedAdapter
from toile.diffusion.networks import DenoisingNetwork
from toile.diffusion.triton.packed import check_adapter
from toile.diffusion.triton.remote_unet import remote, without_weights
from toile.diffusion.turns import NO_HURRY, Urgency


class BankedDenoiser:
    """Evaluates the graph that engines are exported from, in fp32, with adapters of packed files.

    It is slower than an engine and than `TorchDenoiser`; it says what an engine would draw.
    """

    def __init__(
        self, bundle: Bundle, layout: BankLayout, packed: Mapping[str, PackedAdapter]
    ) -> None:
        """Make a denoiser.

        Args:
            bundle: The base, in fp32.
            layout: Of the bank.
            packed: The adapters that can be drawn with, by their keys.
        """
        self._layout, self._packed, self._base_digest = layout, packed, bundle.digest
        self._device = bundle.device
        self._network = DenoisingNetwork(BankedUNet(bundle.unet, layout))
        self._unet = without_weights(dict(bundle.unet.config))

    @contextlib.contextmanager
    def session(
        self,
        adapters: Sequence[LoadedAdapter],
        urgency: Urgency = NO_HURRY,  # noqa: ARG002 - it has no queue
        controls: Sequence[LoadedControl] = (),
    ) -> Iterator[UNet2DConditionModel]:
        """Hold the base's UNet with these adapters applied.

        Raises:
            InvalidArgumentError: An adapter is of another base (`ADAPTER_MISMATCH`).
            FailedPreconditionError: There are ControlNets (`NO_CONTROLS`).
        """
        if controls:
            raise FailedPreconditionError("this draws without ControlNets", reason="NO_CONTROLS")
        for adapter in adapters:
            check_adapter(adapter.weights, self._layout, base_digest=self._base_digest)

        def evaluate(arrays: "dict[str, np.ndarray[Any, Any]]") -> "np.ndarray[Any, Any]":
            timestep = float(arrays["timestep"].flat[0])
            own = [(self._packed[a.key], a.weight_at(timestep)) for a in adapters]
            bank = gather([own] * len(arrays["sample"]), self._layout)
            inputs = {**arrays, **bank, "timestep": arrays["timestep"].reshape(-1)}
            given = {name: torch.from_numpy(a).to(self._device) for name, a in inputs.items()}
            predicted: np.ndarray[Any, Any] = self._network.run(given)["prediction"].cpu().numpy()
            return predicted

        yield remote(self._unet, evaluate)

    def refiner_session(
        self,
        urgency: Urgency = NO_HURRY,  # noqa: ARG002
    ) -> AbstractContextManager[UNet2DConditionModel]:
        """Refuse.

        Raises:
            FailedPreconditionError: Always (`NO_REFINER`).
        """
        raise FailedPreconditionError("this draws without refiners", reason="NO_REFINER")

    def samples_at_once(self, height: int, width: int) -> int:  # noqa: ARG002
        """Return 1: nobody waits for what it draws."""
        return 1
