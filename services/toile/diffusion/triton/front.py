"""The model `unet` in Triton: the front that gathers adapters and makes one engine call a batch.

This file is copied as `model.py` into the model repository and runs in Triton's Python backend,
with copies of the modules of this package that it needs (`repository.SERVER_MODULES`) beside it.
Its environment holds NumPy, safetensors, grpcio and ONNX Runtime, or, for engines, torch and
TensorRT.

Triton's dynamic batcher hands over requests of one shape that wait at the same time, whatever their
adapters, prompts and timesteps: that is continuous batching, a step at a time.

An answer says which request it is to, by the number that the request has for an identity, because
the backend has been seen to mistake one for another (ADR 23).

A request with the parameter `unload` drops the adapter of that name instead; its tensors are not
looked at, and its prediction is zeros.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
from toile.diffusion.bank import BankError, BankLayout, PackedAdapter
from toile.diffusion.triton.evaluators import open_evaluator
from toile.diffusion.triton.resident import ADAPTERS, LOADING, UNLOAD, ResidentAdapters

SOON_SECONDS = 0.005
"""How long an idle engine waits for adapters that are being read: a file that is in memory takes
less, and less than another call would."""

_Member = tuple[int, dict[str, Any], list[Any]]
"""A request: its index, its inputs, and the adapters of each of its samples."""


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine and an empty bank."""
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        layout = BankLayout.from_json((folder / "layout.json").read_text(encoding="utf-8"))
        self._max_rank = int(given["max_rank"])
        self._engine = open_evaluator(
            folder / given["engine"],
            layout,
            max_rank=self._max_rank,
            threads=int(given["threads"]),
        )
        self._inputs = [one["name"] for one in config["input"] if one["name"] != ADAPTERS]
        self._batch_pixels = int(given["batch_pixels"])
        self._bank = ResidentAdapters(layout, int(given["bank_bytes"]), self._engine.place)
        self._metrics = _Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, as few engine calls as their shapes allow."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[_Member]] = {}
        late = self._sort(requests, range(len(requests)), groups, responses)
        if late and not groups:  # nobody else wants the engine now
            self._bank.wait(SOON_SECONDS)
            self._sort(requests, late, groups, responses)
        for members in groups.values():
            for some in self._within_cap(members):
                self._run(some, requests, responses)
        dropped = self._bank.shrink()
        self._metrics.bank(self._bank.loaded, dropped, self._bank.bytes)
        self._bank.loaded.clear()
        return responses

    def _sort(
        self,
        requests: list[Any],
        indices: Iterable[int],
        groups: dict[tuple[Any, ...], list[_Member]],
        responses: list[Any],
    ) -> list[int]:
        """Put requests with others of their shape, or answer them; return who lacks adapters."""
        late: list[int] = []
        for index in indices:
            request = requests[index]
            unwanted = json.loads(request.parameters() or "{}").get(UNLOAD)
            if unwanted:
                self._metrics.unloaded(self._bank.unload(unwanted))
                responses[index] = _answer(request, _zeros_like_answer(request))
                continue
            inputs = {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            try:
                samples = self._adapters(request, len(inputs["sample"]))
            except Exception as error:  # noqa: BLE001 - a response for each request
                responses[index] = _error(str(error))
                if str(error).startswith(LOADING):
                    late.append(index)
                continue
            responses[index] = None
            shapes = tuple(array.shape[1:] for array in inputs.values())
            groups.setdefault(shapes, []).append((index, inputs, samples))
        return late

    def _within_cap(self, members: list[_Member]) -> list[list[_Member]]:
        """Split requests of one shape into batches that hold at most so many latent pixels."""
        height, width = members[0][1]["sample"].shape[2:]
        most = max(1, self._batch_pixels // (height * width))
        if (allowed := self._engine.most_samples(height, width)) is not None:
            most = min(most, allowed)
        batches: list[list[_Member]] = [[]]
        samples = 0
        for member in members:
            count = len(member[1]["sample"])
            if batches[-1] and samples + count > most:
                batches.append([])
                samples = 0
            batches[-1].append(member)
            samples += count
        return batches

    def _adapters(self, request: Any, batch: int) -> list[list[tuple[PackedAdapter, float]]]:
        """Return the adapters of each sample of a request."""
        given = pb_utils.get_input_tensor_by_name(request, ADAPTERS).as_numpy().reshape(-1)
        samples: list[list[tuple[PackedAdapter, float]]] = []
        absent: list[BankError] = []
        for text in given[:batch]:
            sample = []
            for key, weight, *link in json.loads(text):
                try:
                    sample.append((self._bank.get(key, *link), float(weight)))
                except BankError as error:  # go on: the loads of all of them begin now
                    absent.append(error)
            ranks = sum(adapter.rank for adapter, _ in sample)
            if ranks > self._max_rank:
                raise BankError(f"ranks add up to {ranks}; at most {self._max_rank} can be served")
            samples.append(sample)
        if absent:
            raise absent[0]
        return samples

    def _run(self, members: list[_Member], requests: list[Any], out: list[Any]) -> None:
        joined = {
            name: np.concatenate([inputs[name] for _, inputs, _ in members])
            for name in self._inputs
        }
        for name, array in joined.items():
            if name == "timestep" or name.startswith("control_scale_"):
                joined[name] = array.reshape(-1)
            elif name.startswith("control_image_"):
                joined[name] = array.astype(np.float32) / np.float32(255)
        samples = [sample for _, _, given in members for sample in given]
        try:
            predicted = self._engine.run(joined, samples)
        except Exception as error:  # noqa: BLE001 - as above
            for index, _, _ in members:
                # By its reason, where it has one, the caller knows what kind of error it is.
                kind = getattr(error, "reason", type(error).__name__)
                out[index] = _error(f"the engine failed: {kind}: {error}")
            return
        self._metrics.batch(len(samples))
        start = 0
        for index, inputs, _ in members:
            stop = start + len(inputs["sample"])
            out[index] = _answer(requests[index], predicted[start:stop])
            start = stop

    def finalize(self) -> None:
        """Be told that the server unloads the model."""
        self._engine.close()


def _answer(request: Any, prediction: "np.ndarray[Any, Any]") -> Any:
    number = np.full((len(prediction), 1), int(request.request_id() or 0), np.int64)
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("prediction", prediction),
            pb_utils.Tensor("request", number),
        ]
    )


def _zeros_like_answer(request: Any) -> "np.ndarray[Any, Any]":
    sample = pb_utils.get_input_tensor_by_name(request, "sample").as_numpy()
    return np.zeros(sample.shape, np.float32)


class _Metrics:
    """Counters at Triton's own metrics port."""

    def __init__(self, model: str) -> None:
        self._bytes = _metric("toile_bank_bytes", "Bytes of adapters in memory.", "GAUGE", model)
        self._loads = _metric("toile_bank_loads_total", "Adapters read.", "COUNTER", model)
        self._load_seconds = _metric(
            "toile_bank_load_seconds_total", "Seconds spent reading adapters.", "COUNTER", model
        )
        self._evictions = _metric(
            "toile_bank_evictions_total", "Adapters dropped for room.", "COUNTER", model
        )
        self._unloads = _metric(
            "toile_bank_unloads_total", "Adapters dropped by name.", "COUNTER", model
        )
        self._calls = _metric("toile_engine_calls_total", "Calls of the engine.", "COUNTER", model)
        self._bytes_told = 0
        self._samples = _metric(
            "toile_engine_samples_total", "Samples in the engine's calls.", "COUNTER", model
        )

    def batch(self, samples: int) -> None:
        self._calls.increment(1)
        self._samples.increment(samples)

    def unloaded(self, was_there: bool) -> None:
        if was_there:
            self._unloads.increment(1)

    def bank(self, loads: list[float], evicted: int, held_bytes: int) -> None:
        if loads:
            self._loads.increment(len(loads))
            self._load_seconds.increment(sum(loads))
        if evicted:
            self._evictions.increment(evicted)
        if held_bytes != self._bytes_told:  # telling the server costs a twentieth of a millisecond
            self._bytes.set(held_bytes)
            self._bytes_told = held_bytes


def _metric(name: str, description: str, kind: str, model: str) -> Any:
    family = pb_utils.MetricFamily(
        name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
    )
    metric = family.Metric(labels={"model": model})
    _FAMILIES.append(family)
    return metric


_FAMILIES: list[Any] = []
"""A family must outlive its metrics."""


def _error(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
