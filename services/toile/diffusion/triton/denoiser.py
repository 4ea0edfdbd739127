"""A denoiser whose UNets are in Triton: stock pipelines, each step one call.

The UNet that pipelines get is diffusers' own class on the meta device, without weights, with a
forward that calls the server. Steps queue here for the server, which only batches (ADR 9).
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import tenacity
import tritonclient.grpc as triton
from diffusers import UNet2DConditionModel
from tritonclient.utils import InferenceServerException

from toile.core.artifacts import may_come_back
from toile.core.errors import (
    ComputeUnavailableError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    ToileError,
)
from toile.diffusion.bank import BankLayout
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import LoadedAdapter
from toile.diffusion.engines import NEAREST
from toile.diffusion.triton.packed import check_adapter
from toile.diffusion.triton.remote_unet import remote, without_weights
from toile.diffusion.triton.repository import FrontConfig
from toile.diffusion.triton.resident import ADAPTERS, LOADING, MISSING, UNREAD
from toile.diffusion.turns import NO_HURRY, Turns, Urgency

STEP_SECONDS = 60.0
"""How long one step may take: its wait in the queue, and a server that is restarted, included."""
LONGEST_PAUSE_SECONDS = 0.5

BATCHES_AT_ONCE = 2
"""Full batches that this process may have at the server: one in the engine, one to follow."""

Link = Callable[[LoadedAdapter], str]
"""Packs an adapter where the server can read it, and returns the link."""


class TritonDenoiser:
    """Evaluates a base's UNets in a Triton server; sessions run side by side and share batches."""

    def __init__(
        self,
        address: str,
        *,
        unet_config: dict[str, Any],
        layout: BankLayout,
        link: Link,
        refiner_config: dict[str, Any] | None = None,
        base_digest: str = "",
        unet_model: str = "unet",
        refiner_model: str = "refiner",
        control_models: Mapping[str, str] | None = None,
        step_seconds: float = STEP_SECONDS,
        front: FrontConfig | None = None,
    ) -> None:
        """Connect; the server is not asked until a step is.

        Args:
            address: host:port of Triton's gRPC.
            unet_config: Config of the base's UNet.
            layout: Of the bank of the UNet's model.
            link: Called for an adapter that the server lacks.
            refiner_config: Config of the refiner's UNet; None when the base has none.
            base_digest: Digest of the base.
            unet_model: The server's model of the UNet.
            refiner_model: The server's model of the refiner.
            control_models: The server's models of the UNet with one of the base's own ControlNets,
                by its kind.
            step_seconds: How long one step may take.
            front: How the server's models batch.
        """
        front = front or FrontConfig()
        self._front = front
        self._client = triton.InferenceServerClient(address)
        self._unet = without_weights(unet_config)
        self._refiner = None if refiner_config is None else without_weights(refiner_config)
        self._layout, self._link, self._base_digest = layout, link, base_digest
        self._unet_model = _Model(self._client, unet_model, front)
        self._refiner_model = _Model(self._client, refiner_model, front)
        self._control_models = {
            kind: _Model(self._client, name, front) for kind, name in (control_models or {}).items()
        }
        self._step_seconds, self._max_rank = step_seconds, front.max_rank

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def is_ready(self) -> bool:
        """Say whether the server answers and has all models of the base."""
        models = [self._unet_model.name]
        if self._refiner is not None:
            models.append(self._refiner_model.name)
        return self._are_ready(*models)

    def has_controls(self, controls: Sequence[LoadedControl]) -> bool:
        """Say whether the server has, or once had, a model with these ControlNets.

        One has one ControlNet, and it is one that came with the base.
        """
        model = self._control_models.get(controls[0].kind) if len(controls) == 1 else None
        if model is None:
            return False
        model.was_seen = model.was_seen or self._are_ready(model.name)
        return model.was_seen

    def _are_ready(self, *models: str) -> bool:
        try:
            return all(self._client.is_model_ready(m, client_timeout=2.0) for m in models)
        except InferenceServerException:
            return False

    @contextlib.contextmanager
    def session(
        self,
        adapters: Sequence[LoadedAdapter],
        urgency: Urgency = NO_HURRY,
        controls: Sequence[LoadedControl] = (),
    ) -> Iterator[UNet2DConditionModel]:
        """Hold a UNet with these adapters applied.

        Raises:
            InvalidArgumentError: An adapter is of another base (`ADAPTER_MISMATCH`), is named
                twice (`DUPLICATE_ADAPTER`), or all ranks together are over the engine's
                (`RANK_TOO_HIGH`).
            FailedPreconditionError: There are ControlNets that no model has (`NO_CONTROLS`).
        """
        model = self._unet_model
        if controls:
            if len(controls) > 1 or controls[0].kind not in self._control_models:
                raise FailedPreconditionError(
                    "the server has no engine with these ControlNets", reason="NO_CONTROLS"
                )
            model = self._control_models[controls[0].kind]
        if len({adapter.key for adapter in adapters}) < len(adapters):
            raise InvalidArgumentError(
                "an adapter is named twice", field="adapters", reason="DUPLICATE_ADAPTER"
            )
        _check_ranks(adapters, self._max_rank)
        for adapter in adapters:
            check_adapter(adapter.weights, self._layout, base_digest=self._base_digest)
        step = _Call(model, adapters, self._link, urgency, self._step_seconds, controls)
        yield remote(self._unet, step)

    @contextlib.contextmanager
    def refiner_session(self, urgency: Urgency = NO_HURRY) -> Iterator[UNet2DConditionModel]:
        """Hold the refiner's UNet.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
        """
        if self._refiner is None:
            raise FailedPreconditionError("this base has no refiner", reason="NO_REFINER")
        step = _Call(self._refiner_model, [], self._link, urgency, self._step_seconds)
        yield remote(self._refiner, step)

    def samples_at_once(self, height: int, width: int) -> int:
        """Return how many samples of latents of a size one engine call takes."""
        return min(self._front.max_batch, self._front.batch_pixels // (height * width))


class _Model:
    """A model of the server and the queue for it: steps that are waited for go first.

    What is sent is so little that the server's own order, first come first served, hardly matters.
    """

    def __init__(self, client: triton.InferenceServerClient, name: str, front: FrontConfig) -> None:
        self.name = name
        self.was_seen = False
        self._client, self._front = client, front
        self._turns = Turns(BATCHES_AT_ONCE * front.batch_pixels)

    def infer(
        self,
        inputs: "Sequence[triton.InferInput]",
        shape: Sequence[int],
        urgency: Urgency,
        most_seconds: float,
    ) -> "np.ndarray[Any, Any]":
        """Send a sample of a shape `[B, C, h, w]` when it is its turn, and wait for the answer."""
        batch, _, height, width = shape
        share = self._front.batch_pixels // self._front.max_batch
        cost = batch * max(height * width, share)
        until = time.monotonic() + most_seconds  # the wait for the turn counts
        try:
            with self._turns.turn(urgency, cost, most_seconds=most_seconds):
                left = urgency.seconds_left(until - time.monotonic())
                answer = self._client.infer(self.name, inputs, client_timeout=left)
        except InferenceServerException as error:
            if "DEADLINE_EXCEEDED" in str(error.status()) and urgency.deadline <= until:
                raise DeadlineError("the UNet did not answer in time") from error
            raise _meaning(error) from error
        return cast("np.ndarray[Any, Any]", answer.as_numpy("prediction"))


class _Call:
    """One evaluation of a model: called again while the server restarts or reads an adapter.

    The same while the artifact store does not answer. That is safe, because an evaluation changes
    nothing.
    """

    def __init__(
        self,
        model: _Model,
        adapters: Sequence[LoadedAdapter],
        link: Link,
        urgency: Urgency,
        step_seconds: float,
        controls: Sequence[LoadedControl] = (),
    ) -> None:
        self._model, self._urgency = model, urgency
        self._adapters, self._link, self._step_seconds = adapters, link, step_seconds
        self._controls = controls
        self._maps: dict[tuple[int, int, int], np.ndarray[Any, Any]] = {}

    def __call__(self, arrays: "dict[str, np.ndarray[Any, Any]]") -> "np.ndarray[Any, Any]":
        """Return the prediction `[B, C, H/8, W/8]`.

        Raises:
            DeadlineError: The session's deadline is past.
            ExhaustedError: The queue is full.
            ComputeUnavailableError: The server did not come back, or the engine failed.
            StoreUnavailableError: The artifact store did not come back.
        """
        inputs = [_input(name, array, "FP32") for name, array in arrays.items()]
        batch = len(arrays["sample"])
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=_pause,
            stop=tenacity.stop_after_delay(self._urgency.seconds_left(self._step_seconds)),
        )
        timestep = float(arrays["timestep"].flat[0])
        for index, control in enumerate(self._controls):
            pixels = self._map(index, *arrays["sample"].shape[-2:])
            scales = np.full((batch, 1), control.scale_at(timestep), np.float32)
            inputs += [
                _input(f"control_image_{index}", np.stack([pixels] * batch), "UINT8"),
                _input(f"control_scale_{index}", scales, "FP32"),
            ]
        entries = [(adapter.key, adapter.weight_at(timestep)) for adapter in self._adapters]
        named = json.dumps(entries)
        try:
            for attempt in retrying:
                with attempt:
                    try:
                        return self._model.infer(
                            [*inputs, _names(named, batch)],
                            arrays["sample"].shape,
                            self._urgency,
                            self._step_seconds,
                        )
                    except _AbsentError:
                        links = (self._link(adapter) for adapter in self._adapters)
                        named = json.dumps(
                            [(*entry, link) for entry, link in zip(entries, links, strict=True)]
                        )
                        raise
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            self._urgency.seconds_left(self._step_seconds)
            if isinstance(last, ToileError):
                raise last from None
            raise ComputeUnavailableError(f"Triton does not answer: {last}") from last
        raise AssertionError("unreachable")

    def _map(self, index: int, height: int, width: int) -> "np.ndarray[Any, Any]":
        if (index, height, width) not in self._maps:
            self._maps[index, height, width] = self._controls[index].pixels(height, width)
        return self._maps[index, height, width]


class _NotYetError(Exception):
    """The same call may succeed in a moment."""


class _AbsentError(_NotYetError):
    """The server has not got an adapter, and was not told where it is."""


class _UnreadError(_AbsentError):
    """The server could not read an adapter where it was told that it is."""


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, _NotYetError) or may_come_back(error)


def _check_ranks(adapters: Sequence[LoadedAdapter], most: int) -> None:
    ranks = [max(layer.rank for layer in a.weights.layers.values()) for a in adapters]
    if sum(ranks) > most:
        raise InvalidArgumentError(
            f"the adapters' ranks add up to {sum(ranks)}; at most {most} can be served",
            field="adapters",
            reason="RANK_TOO_HIGH",
            metadata={"ranks": str(sum(ranks)), "limit": str(most)},
        )


def _pause(state: tenacity.RetryCallState) -> float:
    """Return the seconds before a step is asked for again: none for who can give a link now."""
    if state.outcome is not None and type(state.outcome.exception()) is _AbsentError:
        return 0.0
    return min(0.001 * 2.0 ** min(state.attempt_number - 1, 16), LONGEST_PAUSE_SECONDS)


def _input(name: str, array: "np.ndarray[Any, Any]", kind: str) -> Any:
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


@functools.lru_cache(maxsize=64)  # the steps of a drawing have the same
def _names(text: str, batch: int) -> Any:
    return _input(ADAPTERS, np.full((batch, 1), text, dtype=object), "BYTES")


def _meaning(error: InferenceServerException) -> Exception:
    """Return the error that stands for one of Triton's."""
    status, message = str(error.status()), str(error.message())
    if MISSING in message:
        return _AbsentError(message)
    if UNREAD in message:
        return _UnreadError(message)
    if LOADING in message:
        return _NotYetError(message)
    if "DEADLINE_EXCEEDED" in status:
        return ComputeUnavailableError("Triton did not answer in time")
    if "SHAPE_OUT_OF_PROFILE" in message:
        near = re.search(rf"{NEAREST}(\d+x\d+)", message)
        return InvalidArgumentError(
            message,
            field="width",
            reason="SHAPE_OUT_OF_PROFILE",
            metadata={"nearest": near[1]} if near else {},
        )
    # A server that is gone, or back and still without the model.
    if "UNAVAILABLE" in status or "unknown model" in message or "is not ready" in message:
        return _NotYetError(message)
    # Its front did not run for a second, as on a machine that stood still. The server starts it
    # again, or ends over that and is started again by whoever keeps it.
    if "is not healthy" in message or "health mutex" in message:
        return _NotYetError(message)
    return ComputeUnavailableError(f"Triton failed: {message}")
