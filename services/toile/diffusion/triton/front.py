"""The model `unet` in Triton: the front that gathers adapters and makes one engine call a batch.

This file is copied as `model.py` into the model repository and runs in Triton's Python backend, in
an environment with NumPy, ONNX Runtime and safetensors alone. `bank.py` lies beside it.

Triton's dynamic batcher hands over requests of one shape that wait at the same time, whatever their
adapters, prompts and timesteps: that is continuous batching, a step at a time.
"""

import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
from bank import BankError, BankLayout, PackedAdapter, gather

MISSING = "ADAPTER_NOT_RESIDENT"
"""How an error begins that the caller answers by calling again with a link to the adapter."""
LOADING = "ADAPTER_LOADING"
"""How an error begins after which the caller calls again in a moment."""
ADAPTERS = "adapters"
"""The input that names them; the others are the graph's."""
LOADERS = 2
LOAD_SECONDS = 30.0


class Bank:
    """Packed adapters in memory, within a budget of bytes; the least recently used go first.

    They are read in threads: the batches of those who have theirs do not wait for it.
    """

    def __init__(self, layout: BankLayout, budget_bytes: int) -> None:
        self._layout, self._budget = layout, budget_bytes
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._loading: dict[str, Future[tuple[PackedAdapter, float]]] = {}
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="bank")
        self.bytes = 0
        self.loaded: list[float] = []
        """Seconds that each load took since somebody last emptied the list."""

    def get(self, key: str, link: str = "") -> PackedAdapter:
        """Return an adapter that is in memory; with a link, begin to read one that is not.

        Raises:
            BankError: It is not there (`ADAPTER_NOT_RESIDENT`), not yet (`ADAPTER_LOADING`), or
                what the link leads to is no adapter for this UNet.
        """
        found = self._adapters.get(key)
        if found is not None:
            self._adapters.move_to_end(key)
            return found
        under_way = self._loading.get(key)
        if under_way is None:
            if not link:
                raise BankError(f"{MISSING} {key}")
            self._loading[key] = self._threads.submit(_read, link, self._layout)
            raise BankError(f"{LOADING} {key}")
        if not under_way.done():
            raise BankError(f"{LOADING} {key}")
        del self._loading[key]
        adapter, seconds = under_way.result()
        self.loaded.append(seconds)
        self._adapters[key] = adapter
        self.bytes += adapter.size_bytes
        return adapter

    def shrink(self) -> int:
        """Drop what is over the budget; returns how many."""
        dropped = 0
        while self.bytes > self._budget and len(self._adapters) > 1:
            _, adapter = self._adapters.popitem(last=False)
            self.bytes -= adapter.size_bytes
            dropped += 1
        return dropped


def _read(link: str, layout: BankLayout) -> tuple[PackedAdapter, float]:
    """Return what a `file:` or `https:` link leads to, and the seconds it took.

    Raises:
        BankError: It cannot be read, or is no packed adapter for this layout.
    """
    started = time.monotonic()
    parts = urllib.parse.urlsplit(link)
    if parts.scheme == "file":
        adapter = PackedAdapter.load(Path(urllib.parse.unquote(parts.path)), layout)
    elif parts.scheme in {"http", "https"}:
        with tempfile.TemporaryDirectory(prefix="toile-bank-") as folder:
            path = Path(folder) / "adapter.safetensors"
            try:
                with urllib.request.urlopen(link, timeout=LOAD_SECONDS) as answer:  # noqa: S310
                    path.write_bytes(answer.read())
            except (urllib.error.URLError, OSError) as error:
                raise BankError(f"the adapter could not be read: {error}") from error
            adapter = PackedAdapter.load(path, layout)
    else:
        raise BankError(f"{parts.scheme or 'no scheme'}: is no link to an adapter")
    return adapter, time.monotonic() - started


_Member = tuple[int, dict[str, Any], list[Any]]
"""A request: its index, its inputs, and the adapters of each of its samples."""


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine and an empty bank."""
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(given["threads"]) or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        self._engine = onnxruntime.InferenceSession(
            folder / given["engine"], options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [one["name"] for one in config["input"] if one["name"] != ADAPTERS]
        self._layout = BankLayout.from_json((folder / "layout.json").read_text(encoding="utf-8"))
        self._max_rank = int(given["max_rank"])
        self._batch_pixels = int(given["batch_pixels"])
        self._bank = Bank(self._layout, int(given["bank_bytes"]))
        self._metrics = _Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, as few engine calls as their shapes allow."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[_Member]] = {}
        for index, request in enumerate(requests):
            inputs = {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            try:
                samples = self._adapters(request, len(inputs["sample"]))
            except Exception as error:  # noqa: BLE001 - a response for each request
                responses[index] = _error(str(error))
                continue
            shapes = tuple(array.shape[1:] for array in inputs.values())
            groups.setdefault(shapes, []).append((index, inputs, samples))
        for members in groups.values():
            for some in self._within_cap(members):
                self._run(some, responses)
        self._metrics.bank(self._bank.loaded, self._bank.shrink(), self._bank.bytes)
        self._bank.loaded.clear()
        return responses

    def _within_cap(self, members: list[_Member]) -> list[list[_Member]]:
        """Split requests of one shape into batches that hold at most so many latent pixels."""
        height, width = members[0][1]["sample"].shape[2:]
        most = max(1, self._batch_pixels // (height * width))
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

    def _run(self, members: list[_Member], out: list[Any]) -> None:
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
            bank = gather(samples, self._layout, max_rank=self._max_rank)
            predicted = self._engine.run(None, {**joined, **bank})[0]
        except Exception as error:  # noqa: BLE001 - as above
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

    def batch(self, samples: int) -> None:
        self._calls.increment(1)
        self._samples.increment(samples)

    def bank(self, loads: list[float], evicted: int, held_bytes: int) -> None:
        if loads:
            self._loads.increment(len(loads))
            self._load_seconds.increment(sum(loads))
        if evicted:
            self._evictions.increment(evicted)
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
