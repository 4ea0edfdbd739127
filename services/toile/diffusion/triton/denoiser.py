"""A denoiser whose UNets are in Triton: stock pipelines, each step one call.

The UNet that pipelines get is diffusers' own class on the meta device, without weights, with a
forward that calls the server.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import tritonclient.grpc as triton
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from tritonclient.utils import InferenceServerException

from toile.core.errors import (
    ComputeUnavailableError,
    DeadlineError,
    ExhaustedError,
    FailedPreconditionError,
    InvalidArgumentError,
    ToileError,
)
from toile.diffusion.adapters import AdapterWeights
from toile.diffusion.bank import MAX_RANK, BankError, BankLayout, pack
from toile.diffusion.denoiser import LoadedAdapter

MISSING = "ADAPTER_NOT_RESIDENT"
STEP_SECONDS = 60.0
"""How long one call may take, its wait in the queue included."""


class TritonDenoiser:
    """Evaluates a base's UNets in a Triton server; sessions run side by side and share batches."""

    def __init__(
        self,
        address: str,
        *,
        unet_config: dict[str, Any],
        layout: BankLayout,
        adapters: Path,
        refiner_config: dict[str, Any] | None = None,
        base_digest: str = "",
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        """Connect; the server is not asked until a step is.

        Args:
            address: host:port of Triton's gRPC.
            unet_config: Config of the base's UNet.
            layout: Of the bank of the model `unet`.
            adapters: Folder from which the server reads packed adapters.
            refiner_config: Config of the refiner's UNet; None when the base has none.
            base_digest: Digest of the base.
            step_seconds: How long one call may take.
        """
        self._client = triton.InferenceServerClient(address)
        self._unet_config, self._refiner_config = unet_config, refiner_config
        self._layout, self._adapters, self._base_digest = layout, adapters, base_digest
        self._step_seconds = step_seconds

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @contextlib.contextmanager
    def session(self, adapters: Sequence[LoadedAdapter]) -> Iterator[UNet2DConditionModel]:
        """Hold a UNet with these adapters applied.

        Raises:
            InvalidArgumentError: An adapter is of another base (`ADAPTER_MISMATCH`), is named
                twice (`DUPLICATE_ADAPTER`), or all ranks together are over the engine's
                (`RANK_TOO_HIGH`).
        """
        if len({adapter.key for adapter in adapters}) < len(adapters):
            raise InvalidArgumentError(
                "an adapter is named twice", field="adapters", reason="DUPLICATE_ADAPTER"
            )
        _check_ranks(adapters)
        for adapter in adapters:
            self._give(adapter, again=False)

        def give_again() -> None:
            for adapter in adapters:
                self._give(adapter, again=True)

        named = json.dumps([[file_key(a.key), a.weight] for a in adapters])
        yield _remote(self._unet_config, self._caller("unet", named, give_again))

    @contextlib.contextmanager
    def refiner_session(self) -> Iterator[UNet2DConditionModel]:
        """Hold the refiner's UNet.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
        """
        if self._refiner_config is None:
            raise FailedPreconditionError("this base has no refiner", reason="NO_REFINER")
        yield _remote(self._refiner_config, self._caller("refiner", "[]", lambda: None))

    def _give(self, adapter: LoadedAdapter, *, again: bool) -> None:
        """Put an adapter where the server reads it, whole or not at all."""
        path = self._adapters / f"{file_key(adapter.key)}.safetensors"
        if path.is_file() and not again:
            return
        packed = pack_adapter(adapter.weights, self._layout, base_digest=self._base_digest)
        self._adapters.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            packed.save(partial, self._layout)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _caller(self, model: str, adapters: str, give_again: Callable[[], None]) -> "_Call":
        def call(arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
            batch = len(arrays["sample"])
            inputs = [_input(name, array, "FP32") for name, array in arrays.items()]
            named = np.full((batch, 1), adapters, dtype=object)
            inputs.append(_input("adapters", named, "BYTES"))
            for attempt in (1, 2):
                try:
                    answer = self._client.infer(model, inputs, client_timeout=self._step_seconds)
                except InferenceServerException as error:
                    if attempt == 1 and MISSING in str(error.message()):
                        give_again()
                        continue
                    raise _as_own(error) from error
                return cast("np.ndarray[Any, Any]", answer.as_numpy("prediction"))
            raise AssertionError("unreachable")

        return call


def pack_adapter(weights: AdapterWeights, layout: BankLayout, *, base_digest: str = "") -> Any:
    """Pack an adapter for a bank.

    Raises:
        InvalidArgumentError: It is of another base, or has layers that the bank does not hold
            (`ADAPTER_MISMATCH`).
    """
    if base_digest and weights.base_digest and base_digest != weights.base_digest:
        raise InvalidArgumentError(
            "the adapter was trained on another base",
            field="adapters",
            reason="ADAPTER_MISMATCH",
            metadata={"base_digest": base_digest, "adapter_base_digest": weights.base_digest},
        )
    layers = {
        path: (layer.down.float().numpy(), layer.up.float().numpy(), layer.alpha)
        for path, layer in weights.layers.items()
    }
    try:
        return pack(layers, layout, dtype=np.float32, base_digest=weights.base_digest)
    except BankError as error:
        raise InvalidArgumentError(
            f"the adapter does not fit the base: {error}",
            field="adapters",
            reason="ADAPTER_MISMATCH",
        ) from error


def _check_ranks(adapters: Sequence[LoadedAdapter]) -> None:
    ranks = [max(layer.rank for layer in a.weights.layers.values()) for a in adapters]
    if sum(ranks) > MAX_RANK:
        raise InvalidArgumentError(
            f"the adapters' ranks add up to {sum(ranks)}; at most {MAX_RANK} can be served",
            field="adapters",
            reason="RANK_TOO_HIGH",
            metadata={"ranks": str(sum(ranks)), "limit": str(MAX_RANK)},
        )


def file_key(key: str) -> str:
    """Return an adapter's key as a file name."""
    return key.replace("%", "%25").replace("/", "%2F")


_Call = Callable[[dict[str, "np.ndarray[Any, Any]"]], "np.ndarray[Any, Any]"]


class _RemoteUNet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """A UNet without weights; what pipelines ask of one is its config, its type and its forward."""

    _call: _Call

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        if foreign := [name for name, value in unused.items() if value is not None]:
            raise TypeError(f"the remote UNet does not take {', '.join(foreign)}")
        batch = sample.shape[0]
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1).expand(batch, 1)
        arrays = {
            "sample": sample,
            "timestep": times,
            "encoder_hidden_states": encoder_hidden_states,
            "text_embeds": added_cond_kwargs["text_embeds"],
            "time_ids": added_cond_kwargs["time_ids"],
        }
        predicted = torch.tensor(  # a copy: the answer's memory is the call's, and read-only
            self._call(
                {
                    name: np.ascontiguousarray(tensor.to(torch.float32).numpy())
                    for name, tensor in arrays.items()
                }
            )
        )
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


def _remote(config: dict[str, Any], call: _Call) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.__class__ = _RemoteUNet
    unet._call = call
    return unet


def _input(name: str, array: "np.ndarray[Any, Any]", kind: str) -> Any:
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def _as_own(error: InferenceServerException) -> ToileError:
    """Return the error of our tree that stands for one of Triton's."""
    status, message = str(error.status()), str(error.message())
    if "DEADLINE_EXCEEDED" in status:
        return DeadlineError("the UNet did not answer in time")
    if "Exceeds maximum queue size" in message or "Request timeout expired" in message:
        return ExhaustedError("the UNet's queue is full; try again later")
    if "UNAVAILABLE" in status:
        return ComputeUnavailableError(f"Triton does not answer: {message}")
    return ComputeUnavailableError(f"Triton failed: {message}")
