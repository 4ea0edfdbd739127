"""Denoisers: whatever evaluates the UNet for a pipeline."""

import contextlib
import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_fit import check_base, check_fits
from toile.diffusion.adapters import AdapterWeights, linear_targets
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl, controlled, shadowed
from toile.diffusion.loading import MAKING
from toile.diffusion.sdxl import TRAINED_TIMESTEPS
from toile.diffusion.text_encoders import TextAdapter
from toile.diffusion.turns import NO_HURRY, Turns, Urgency

ADAPTER_CACHE_BYTES = 512 << 20
"""Adapters kept in the UNet, by their own size; the least recently used go first."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter to draw with."""

    key: str
    """What tells it from others: its artifact, or any text that is its own."""
    weights: AdapterWeights
    weight: float = 1.0
    """Strength: 1 as trained, 0 none, negative away from the style."""
    schedule: Sequence[tuple[float, float]] = ()
    """Strength that changes while an image is drawn, in place of `weight`: (share, strength) in
    ascending order of shares, from 0, all noise, to 1, none left; straight lines in between."""

    def weight_at(self, timestep: float) -> float:
        """Return the strength at a timestep, of the 1000 that SDXL was trained with."""
        if not self.schedule:
            return self.weight
        shares, weights = zip(*self.schedule, strict=True)
        return float(np.interp(1.0 - timestep / TRAINED_TIMESTEPS, shares, weights))

    @property
    def text_adapter(self) -> TextAdapter | None:
        """What it is to the text encoders, if it changes them.

        Prompts are encoded once for a drawing, so a schedule counts with its mean.
        """
        weight = self.weight
        if self.schedule:
            shares, weights = zip(*self.schedule, strict=True)
            # Before its first point and after its last it stays as it is there.
            levels = [weights[0], *weights, weights[-1]]
            weight = float(np.trapezoid(levels, [0.0, *shares, 1.0]))
        if not (self.weights.text_layers and weight):
            return None
        return TextAdapter(self.key, self.weights, weight)


class Denoiser(Protocol):
    """What the pipelines draw with.

    A session gives something that the stock diffusers pipelines take for their UNet. In one
    process it is the UNet itself; a remote denoiser gives a `UNet2DConditionModel` on the meta
    device whose forward is a call. Sessions may be opened from several threads.
    """

    def session(
        self,
        adapters: Sequence[LoadedAdapter],
        urgency: Urgency = NO_HURRY,
        controls: Sequence[LoadedControl] = (),
    ) -> AbstractContextManager[UNet2DConditionModel]:
        """Hold the base's UNet with these adapters and ControlNets applied.

        Raises:
            InvalidArgumentError: An adapter is of another base (`ADAPTER_MISMATCH`).
            CancelledError: It was cancelled before the session's turn.
            DeadlineError: The deadline came before that.
        """
        ...

    def refiner_session(
        self, urgency: Urgency = NO_HURRY
    ) -> AbstractContextManager[UNet2DConditionModel]:
        """Hold the refiner's UNet.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
            CancelledError: It was cancelled before the session's turn.
            DeadlineError: The deadline came before that.
        """
        ...

    def samples_at_once(self, height: int, width: int) -> int:
        """Return how many samples of latents of a size are evaluated together, of all sessions."""
        ...


class TorchDenoiser:
    """The bundle's UNet in this process, with adapters by peft; one session at a time."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_bytes: int = ADAPTER_CACHE_BYTES,
        bfloat16: bool | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Make a denoiser.

        Args:
            bundle: The base.
            cache_bytes: Adapters kept between sessions.
            bfloat16: Evaluate the UNet under bf16 autocast; where the CPU has the
                instructions for it when None.
            autocast: Evaluate it under autocast to this in place of that, and on GPUs, too.
        """
        self._bundle = bundle
        self._cache_bytes = cache_bytes
        self._bfloat16 = cpu_has_bfloat16() if bfloat16 is None else bfloat16
        self._autocast = autocast
        self._turns, self._refiner_turns = Turns(1), Turns(1)
        self._names: OrderedDict[str, tuple[str, int]] = OrderedDict()  # key: peft name, bytes
        self._serial = 0
        self._targets: dict[str, tuple[int, int]] | None = None

    @property
    def resident_bytes(self) -> int:
        """Size of the adapters that are kept."""
        return sum(size for _, size in self._names.values())

    @contextlib.contextmanager
    def session(
        self,
        adapters: Sequence[LoadedAdapter],
        urgency: Urgency = NO_HURRY,
        controls: Sequence[LoadedControl] = (),
    ) -> Iterator[UNet2DConditionModel]:
        """Hold the base's UNet with these adapters and ControlNets applied.

        Raises:
            InvalidArgumentError: An adapter is of another base (`ADAPTER_MISMATCH`), or is
                named twice (`DUPLICATE_ADAPTER`).
            CancelledError: It was cancelled before the session's turn.
            DeadlineError: The deadline came before that.
        """
        if len({adapter.key for adapter in adapters}) < len(adapters):
            raise InvalidArgumentError(
                "an adapter is named twice", field="adapters", reason="DUPLICATE_ADAPTER"
            )
        with self._turns.turn(urgency):
            unet = self._bundle.unet
            self._apply(unet, adapters)
            with (
                controlled(unet, controls),
                self._precision(unet),
                self._scheduled(unet, adapters),
            ):
                yield unet

    @contextlib.contextmanager
    def refiner_session(self, urgency: Urgency = NO_HURRY) -> Iterator[UNet2DConditionModel]:
        """Hold the refiner's UNet.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
            CancelledError: It was cancelled before the session's turn.
            DeadlineError: The deadline came before that.
        """
        with (
            self._refiner_turns.turn(urgency),
            self._precision(self._bundle.refiner_unet) as unet,
        ):
            yield unet

    def samples_at_once(self, height: int, width: int) -> int:
        """Return 1: sessions take turns."""
        del height, width
        return 1

    def release(self) -> None:
        """Let go of the UNets when no session holds them; the next one loads them again."""
        last = Urgency(priority=3)  # those who wait already would load them again
        with self._turns.turn(last), self._refiner_turns.turn(last):
            self._names.clear()  # what peft put into the UNet goes with it
            self._bundle.unload_unets()
        gc.collect()  # networks hold on to themselves
        if self._bundle.device.type == "cuda":
            torch.cuda.empty_cache()

    def _apply(self, unet: Any, adapters: Sequence[LoadedAdapter]) -> None:
        names = [self._resident(unet, adapter) for adapter in adapters]
        if names:
            unet.enable_lora()
            unet.set_adapters(names, [adapter.weight for adapter in adapters])
        elif self._names:
            unet.disable_lora()
        self._evict(unet, keep={adapter.key for adapter in adapters})

    @contextlib.contextmanager
    def _scheduled(self, unet: Any, adapters: Sequence[LoadedAdapter]) -> Iterator[None]:
        """Set the strengths of this very timestep before each evaluation, where they change."""
        if not any(adapter.schedule for adapter in adapters):
            yield
            return
        names = [self._names[adapter.key][0] for adapter in adapters]

        def set_weights(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            timestep = float(options["timestep"] if "timestep" in options else inputs[1])
            module.set_adapters(names, [adapter.weight_at(timestep) for adapter in adapters])

        hook = unet.register_forward_pre_hook(set_weights, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _resident(self, unet: Any, adapter: LoadedAdapter) -> str:
        """Return the adapter's name in peft, after loading it if need be."""
        if adapter.key in self._names:
            self._names.move_to_end(adapter.key)
            return self._names[adapter.key][0]
        self._check(unet, adapter.weights)
        self._serial += 1
        name = f"adapter_{self._serial}"
        with MAKING, warnings.catch_warnings():
            # peft warns of several adapters in one model, which is what is wanted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            unet.load_lora_adapter(
                adapter.weights.peft_state(),
                prefix=None,
                adapter_name=name,
                metadata=adapter.weights.peft_config(),
            )
        unet.requires_grad_(False)  # peft makes what it adds trainable
        self._names[adapter.key] = (name, adapter.weights.size_bytes)
        return name

    def _check(self, unet: torch.nn.Module, weights: AdapterWeights) -> None:
        check_base(weights, self._bundle.digest)
        if self._targets is None:
            self._targets = linear_targets(unet)
        check_fits(weights, self._targets)

    def _evict(self, unet: Any, keep: set[str]) -> None:
        for key in [key for key in self._names if key not in keep]:
            if self.resident_bytes <= self._cache_bytes:
                return
            name, _ = self._names.pop(key)
            unet.delete_adapters(name)

    @contextlib.contextmanager
    def _precision(self, unet: UNet2DConditionModel) -> Iterator[UNet2DConditionModel]:
        """Put autocast around the UNet alone; its results come back in fp32."""
        dtype = self._autocast
        if dtype is None and self._bfloat16 and unet.device.type == "cpu":
            dtype = torch.bfloat16
        if dtype in (None, torch.float32):
            yield unet
            return
        with shadowed(unet, _autocast(unet.forward, unet.device.type, dtype)):
            yield unet


def cpu_has_bfloat16() -> bool:
    """Say whether the CPU multiplies bf16 matrices in hardware; elsewhere it is slower."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _autocast(
    forward: Callable[..., Any], device_type: str, dtype: torch.dtype | None
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            result = forward(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0].float(), *result[1:])
        result.sample = result.sample.float()
        return result

    return run
