"""A denoiser whose UNets are in Triton: stock pipelines, each step one call.

The UNet that pipelines get is diffusers' own class on the meta device, without weights, with a
forward that calls the server. Steps queue here for the server, which only batches (ADR 9).
"""

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tenacity
from diffusers import UNet2DConditionModel

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
from toile.diffusion.triton.client import (
    UNAVAILABLE,
    UNREADABLE,
    TritonClient,
    TritonError,
    TritonGoneError,
    TritonLateError,
    TritonRefusedError,
    are_ready,
)
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

_UNSOUND = ("is not healthy", "health mutex", "failed to reserve", UNREADABLE)

Link = Callable[[LoadedAdapter], str]
"""Packs an adapter where the server can read it, and returns the link."""


class TritonDenoiser:
    """Evaluates a base's UNets in a Triton server; sessions run side by side and share batches.

    Each session has a connection of its own. A server that is told to end answers those that are
    open, for a while, and takes no new ones; of several servers each session is given one.
    """

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
        """Make it; the server is not asked until a step is.

        Args:
            address: host:port of Triton's HTTP.
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
        self._address = address
        self._unet = without_weights(unet_config)
        self._refiner = None if refiner_config is None else without_weights(refiner_config)
        self._layout, self._link, self._base_digest = layout, link, base_digest
        self._unet_model = _Model(unet_model, front)
        self._refiner_model = _Model(refiner_model, front)
        self._control_models = {
            kind: _Model(name, front) for kind, name in (control_models or {}).items()
        }
        self._step_seconds, self._max_rank = step_seconds, front.max_rank

    def is_ready(self) -> bool:
        """Say whether the server answers and has all models of the base."""
        models = [self._unet_model.name]
        if self._refiner is not None:
            models.append(self._refiner_model.name)
        return are_ready(self._address, models)

    def has_controls(self, controls: Sequence[LoadedControl]) -> bool:
        """Say whether the server has, or once had, a model with these ControlNets.

        One has one ControlNet, and it is one that came with the base.
        """
        model = self._control_models.get(controls[0].kind) if len(controls) == 1 else None
        if model is None:
            return False
        model.was_seen = model.was_seen or are_ready(self._address, [model.name])
        return model.was_seen

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
        with TritonClient(self._address) as client:
            step = _Call(client, model, adapters, self._link, urgency, self._step_seconds, controls)
            yield remote(self._unet, step)

    @contextlib.contextmanager
    def refiner_session(self, urgency: Urgency = NO_HURRY) -> Iterator[UNet2DConditionModel]:
        """Hold the refiner's UNet.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
        """
        if self._refiner is None:
            raise FailedPreconditionError("this base has no refiner", reason="NO_REFINER")
        with TritonClient(self._address) as client:
            step = _Call(client, self._refiner_model, [], self._link, urgency, self._step_seconds)
            yield remote(self._refiner, step)

    def samples_at_once(self, height: int, width: int) -> int:
        """Return how many samples of latents of a size one engine call takes."""
        return min(self._front.max_batch, self._front.batch_pixels // (height * width))


class _Model:
    """A model of the server and the queue for it: steps that are waited for go first.

    What is sent is so little that the server's own order, first come first served, hardly matters.
    """

    def __init__(self, name: str, front: FrontConfig) -> None:
        self.name = name
        self.was_seen = False
        self._front = front
        self._turns = Turns(BATCHES_AT_ONCE * front.batch_pixels)
        self._opening = threading.Lock()
        self._opened = 0  # times that it was opened from here

    def infer(
        self,
        client: TritonClient,
        inputs: "Mapping[str, np.ndarray[Any, Any]]",
        urgency: Urgency,
        most_seconds: float,
    ) -> "np.ndarray[Any, Any]":
        """Send inputs when it is their turn, and wait for the prediction `[B, C, h, w]`."""
        batch, _, height, width = inputs["sample"].shape
        share = self._front.batch_pixels // self._front.max_batch
        cost = batch * max(height * width, share)
        until = time.monotonic() + most_seconds  # the wait for the turn counts
        with self._turns.turn(urgency, cost, most_seconds=most_seconds):
            left = urgency.seconds_left(until - time.monotonic())
            opened = self._opened
            try:
                return self._ask(client, inputs, left)
            except (_UnsoundError, _ClosedError) as error:
                self._open(client, opened, left, anew=isinstance(error, _UnsoundError))
                raise
            except TritonLateError as error:
                if urgency.deadline <= until:
                    raise DeadlineError("the UNet did not answer in time") from error
                raise ComputeUnavailableError("Triton did not answer in time") from error

    def _ask(
        self,
        client: TritonClient,
        inputs: "Mapping[str, np.ndarray[Any, Any]]",
        seconds: float,
    ) -> "np.ndarray[Any, Any]":
        number = random.getrandbits(62)
        try:
            answer = client.infer(self.name, inputs, seconds=seconds, identity=str(number))
        except TritonGoneError as error:
            raise _NotYetError(str(error)) from error
        except TritonRefusedError as error:
            raise _meaning(error) from error
        if not np.all(answer.get("request") == number):
            raise _UnsoundError("Triton took one request for another")
        return answer["prediction"]

    def _open(self, client: TritonClient, opened: int, seconds: float, *, anew: bool) -> None:
        """Have the server start the front, once for all who found it unsound or closed.

        To load a model that is open and whose files are as they were does nothing, so that it is
        closed before. Should any of it fail, the step will be asked for again and will show it.
        """
        with self._opening:
            if opened == self._opened:
                self._opened += 1
                with contextlib.suppress(TritonError):
                    if anew:
                        client.unload(self.name, seconds=seconds)
                    client.load(self.name, seconds=seconds)


class _Call:
    """One evaluation of a model: called again while the server restarts or reads an adapter.

    The same while the artifact store does not answer. That is safe, because an evaluation changes
    nothing.
    """

    def __init__(
        self,
        client: TritonClient,
        model: _Model,
        adapters: Sequence[LoadedAdapter],
        link: Link,
        urgency: Urgency,
        step_seconds: float,
        controls: Sequence[LoadedControl] = (),
    ) -> None:
        self._client, self._model, self._urgency = client, model, urgency
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
        inputs = dict(arrays)
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
            inputs[f"control_image_{index}"] = np.stack([pixels] * batch)
            inputs[f"control_scale_{index}"] = scales
        entries = [(adapter.key, adapter.weight_at(timestep)) for adapter in self._adapters]
        named = json.dumps(entries)
        try:
            for attempt in retrying:
                with attempt:
                    try:
                        inputs[ADAPTERS] = np.full((batch, 1), named, dtype=object)
                        return self._model.infer(
                            self._client, inputs, self._urgency, self._step_seconds
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


class _UnsoundError(_NotYetError):
    """The server lost its hold on a front, and may take old answers for new ones."""


class _ClosedError(_NotYetError):
    """The server closed a model: another replica found it unsound, and may have gone since."""


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


def _meaning(error: TritonRefusedError) -> Exception:
    """Return the error that stands for one of Triton's."""
    message = str(error)
    if MISSING in message:
        return _AbsentError(message)
    if UNREAD in message:
        return _UnreadError(message)
    if LOADING in message:
        return _NotYetError(message)
    if "SHAPE_OUT_OF_PROFILE" in message:
        near = re.search(rf"{NEAREST}(\d+x\d+)", message)
        return InvalidArgumentError(
            message,
            field="width",
            reason="SHAPE_OUT_OF_PROFILE",
            metadata={"nearest": near[1]} if near else {},
        )
    if "unknown model" in message:
        return _ClosedError(message)
    # A server that ends.
    if error.status == UNAVAILABLE or "is not ready" in message:
        return _NotYetError(message)
    # Its front did not run for a second, as on a machine that stood still (ADR 23). The server ends
    # over that, or goes on and reads memory that is not the answer's.
    if any(words in message for words in _UNSOUND):
        return _UnsoundError(message)
    return ComputeUnavailableError(f"Triton failed: {message}")
