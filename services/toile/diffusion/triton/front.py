"""The model `unet` in Triton: the front that gathers adapters and makes one engine call a batch.

This file is copied as `model.py` into the model repository and runs in Triton's Python backend, in
an environment with NumPy, ONNX Runtime and safetensors alone. `bank.py` lies beside it.

Triton's dynamic batcher hands over requests of one shape that wait at the same time, whatever their
adapters, prompts and timesteps: that is continuous batching, a step at a time.
"""

import json
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
from bank import BankError, BankLayout, PackedAdapter, gather

MISSING = "ADAPTER_NOT_RESIDENT"
"""How an error begins that the caller answers by giving the adapter and calling again."""
MODEL_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


class Bank:
    """Packed adapters in memory, within a budget of bytes; the least recently used go first."""

    def __init__(self, folder: Path, layout: BankLayout, budget_bytes: int) -> None:
        self._folder, self._layout, self._budget = folder, layout, budget_bytes
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self.bytes = 0

    def get(self, key: str) -> tuple[PackedAdapter, bool]:
        """Return an adapter, and whether it was read just now.

        Raises:
            BankError: There is no file of it, or none that fits.
        """
        found = self._adapters.get(key)
        if found is not None:
            self._adapters.move_to_end(key)
            return found, False
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            raise BankError(f"{MISSING} {key}")
        adapter = PackedAdapter.load(path, self._layout)
        self._adapters[key] = adapter
        self.bytes += adapter.size_bytes
        return adapter, True

    def shrink(self) -> int:
        """Drop what is over the budget; returns how many."""
        dropped = 0
        while self.bytes > self._budget and len(self._adapters) > 1:
            _, adapter = self._adapters.popitem(last=False)
            self.bytes -= adapter.size_bytes
            dropped += 1
        return dropped


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine and an empty bank."""
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(given["threads"])
        options.inter_op_num_threads = 1
        self._engine = onnxruntime.InferenceSession(
            folder / given["engine"], options, providers=["CPUExecutionProvider"]
        )
        self._layout = BankLayout.from_json((folder / "layout.json").read_text(encoding="utf-8"))
        self._max_rank = int(given["max_rank"])
        self._max_batch = int(config["max_batch_size"])
        self._bank = Bank(Path(given["adapters"]), self._layout, int(given["bank_bytes"]))
        self._metrics = _Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, as few engine calls as their shapes allow."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Any], list[Any]]]] = {}
        for index, request in enumerate(requests):
            inputs = {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in MODEL_INPUTS
            }
            try:
                samples = self._adapters(request, len(inputs["sample"]))
            except (BankError, ValueError, TypeError) as error:
                responses[index] = _error(str(error))
                continue
            shape = (inputs["sample"].shape[1:], inputs["encoder_hidden_states"].shape[1:])
            groups.setdefault(shape, []).append((index, inputs, samples))
        for members in groups.values():
            self._run(members, responses)
        self._metrics.evicted(self._bank.shrink(), self._bank.bytes)
        return responses

    def _adapters(self, request: Any, batch: int) -> list[list[tuple[PackedAdapter, float]]]:
        """Return the adapters of each sample of a request."""
        given = pb_utils.get_input_tensor_by_name(request, "adapters").as_numpy().reshape(-1)
        samples = []
        for text in given[:batch]:
            sample = []
            for key, weight in json.loads(text):
                started = time.monotonic()
                adapter, loaded = self._bank.get(key)
                if loaded:
                    self._metrics.loaded(time.monotonic() - started)
                sample.append((adapter, float(weight)))
            ranks = sum(adapter.rank for adapter, _ in sample)
            if ranks > self._max_rank:
                raise BankError(f"ranks add up to {ranks}; at most {self._max_rank} can be served")
            samples.append(sample)
        return samples

    def _run(self, members: list[tuple[int, dict[str, Any], list[Any]]], out: list[Any]) -> None:
        joined = {
            name: np.concatenate([inputs[name] for _, inputs, _ in members])
            for name in MODEL_INPUTS
        }
        joined["timestep"] = joined["timestep"].reshape(-1)
        samples = [sample for _, _, given in members for sample in given]
        try:
            bank = gather(samples, self._layout, max_rank=self._max_rank)
            predicted = self._engine.run(None, {**joined, **bank})[0]
        except Exception as error:  # noqa: BLE001 - a response for each request, whatever happens
            for index, _, _ in members:
                out[index] = _error(f"the engine failed: {error}")
            return
        self._metrics.batch(len(samples))
        start = 0
        for index, inputs, _ in members:
            stop = start + len(inputs["sample"])
            tensor = pb_utils.Tensor("prediction", predicted[start:stop])
            out[index] = pb_utils.InferenceResponse(output_tensors=[tensor])
            start = stop


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
        self._calls = _metric("toile_engine_calls_total", "Calls of the engine.", "COUNTER", model)
        self._samples = _metric(
            "toile_engine_samples_total", "Samples in the engine's calls.", "COUNTER", model
        )

    def loaded(self, seconds: float) -> None:
        self._loads.increment(1)
        self._load_seconds.increment(seconds)

    def batch(self, samples: int) -> None:
        self._calls.increment(1)
        self._samples.increment(samples)

    def evicted(self, count: int, held_bytes: int) -> None:
        if count:
            self._evictions.increment(count)
        self._bytes.set(held_bytes)


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
