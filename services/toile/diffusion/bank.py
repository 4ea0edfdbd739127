"""The adapter bank: LoRAs as inputs of the UNet, one set for each sample of a batch.

The targeted Linears of a UNet are put in groups by (in, out). Of a group, an adapter holds two
arrays, `down [n, r, in]` and `up [n, out, r]`, with alpha / rank multiplied into `up`; a target
that it leaves alone is zeros. For a batch they become `down [B, n, R, in]` and `up [B, n, out, R]`:
the ranks of a sample's adapters stand behind one another, their weights multiplied into `up`, and
zeros fill what is left, so a sample computes `W x + up (down x)`, and one without adapters `W x`.

NumPy alone, because a server's Python has no torch; with one that has, the arrays may be tensors.
"""

import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

MAX_RANK = 64
"""Highest sum of the ranks of a sample's adapters that can be served."""

_FORMAT = "1"
_DTYPES: Mapping[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

FloatArray = npt.NDArray[Any]
"""float16 or float32."""

Zeros = Callable[[tuple[int, ...]], Any]
"""Makes an array of a shape, filled with zeros: NumPy's, or a tensor where an engine wants it."""


class BankError(ValueError):
    """A packed file that cannot be used with this engine, or too many ranks for it."""


@dataclass(frozen=True)
class BankGroup:
    """Targets of one shape."""

    in_features: int
    out_features: int
    targets: tuple[str, ...]
    """Module paths in the UNet, in the order of the group's arrays."""

    @property
    def name(self) -> str:
        """Name of the group's inputs: `down_{in}_{out}`, `up_{in}_{out}` without the prefix."""
        return f"{self.in_features}_{self.out_features}"


@dataclass(frozen=True)
class BankLayout:
    """Which Linears of a UNet take adapters, and in which arrays."""

    groups: tuple[BankGroup, ...]

    @classmethod
    def of(cls, targets: Mapping[str, tuple[int, int]]) -> Self:
        """Group targets, (in, out) by module path; the order does not depend on theirs."""
        shapes: dict[tuple[int, int], list[str]] = {}
        for path, shape in sorted(targets.items()):
            shapes.setdefault(shape, []).append(path)
        return cls(
            tuple(BankGroup(*shape, tuple(paths)) for shape, paths in sorted(shapes.items()))
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the engine's bank inputs, in order: down and up of each group."""
        return tuple(f"{half}_{group.name}" for group in self.groups for half in ("down", "up"))

    def bytes_per_rank(self, itemsize: int = 2) -> int:
        """Bytes that one rank of one adapter takes."""
        return itemsize * sum(
            len(group.targets) * (group.in_features + group.out_features) for group in self.groups
        )

    def to_json(self) -> str:
        """Return the layout as JSON."""
        return json.dumps(
            [[group.in_features, group.out_features, list(group.targets)] for group in self.groups]
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(tuple(BankGroup(a, b, tuple(paths)) for a, b, paths in json.loads(text)))


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter in the arrays of a layout, at its own rank."""

    arrays: Mapping[str, Any]
    """By the engine's input names: down `[n, r, in]`, up `[n, out, r]`; of NumPy, or tensors."""
    base_digest: str = ""
    """Digest of the base it was trained on; empty when unknown."""

    @property
    def rank(self) -> int:
        """Highest rank of its layers."""
        return max(
            int(array.shape[1]) for name, array in self.arrays.items() if name.startswith("down_")
        )

    @property
    def size_bytes(self) -> int:
        """Bytes that its arrays take."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def save(self, path: Path, layout: BankLayout) -> None:
        """Write the packed file."""
        save_file(
            dict(self.arrays),
            path,
            metadata={
                "toile.bank.format": _FORMAT,
                "toile.bank.layout": layout.to_json(),
                "toile.base_digest": self.base_digest,
            },
        )

    @classmethod
    def load(cls, path: Path, layout: BankLayout) -> Self:
        """Map a packed file in: its pages are the page cache's, and nothing is copied.

        Raises:
            BankError: It is no packed file, or was packed for another layout.
        """
        try:
            with path.open("rb") as file:
                # Private, so that the arrays may be written to, as torch wants it.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # not there; empty
            raise BankError(f"{path.name} is not a packed adapter: {error}") from error
        np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].max()  # read it now, and not in a step
        return cls.parse(mapped, layout, path.name)

    @classmethod
    def parse(cls, data: mmap.mmap | bytearray, layout: BankLayout, name: str) -> Self:
        """Take a packed file's bytes for an adapter; its arrays are views of them.

        They are read here and not by safetensors, which copies every array; the format is at
        https://huggingface.co/docs/safetensors/index#format.

        Args:
            data: The bytes.
            layout: What it must have been packed for.
            name: What errors call it.

        Raises:
            BankError: They are no packed file, or it was packed for another layout.
        """
        try:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            facts = header.pop("__metadata__", {})
            if facts.get("toile.bank.format") != _FORMAT:
                raise BankError(f"{name} is not a packed adapter of format {_FORMAT}")
            if BankLayout.from_json(facts["toile.bank.layout"]) != layout:
                raise BankError(f"{name} was packed for a UNet with other targets")
            arrays = {key: _array(data, start, found) for key, found in header.items()}
        except BankError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BankError(f"{name} is not a packed adapter: {error}") from error
        if set(arrays) != set(layout.input_names):
            raise BankError(f"{name} lacks arrays of its layout")
        return cls(arrays, facts.get("toile.base_digest", ""))


def _array(data: mmap.mmap | bytearray, start: int, found: Mapping[str, Any]) -> FloatArray:
    """Return the array that an entry of a safetensors header describes."""
    first, last = found["data_offsets"]
    dtype = _DTYPES[found["dtype"]]
    count = (last - first) // dtype.itemsize
    return np.frombuffer(data, dtype, count, start + first).reshape(found["shape"])


def pack(
    layers: Mapping[str, tuple[FloatArray, FloatArray, float]],
    layout: BankLayout,
    *,
    dtype: npt.DTypeLike = np.float16,
    base_digest: str = "",
) -> PackedAdapter:
    """Put a LoRA into a layout's arrays.

    Args:
        layers: down `[r, in]`, up `[out, r]` and alpha, by module path.
        layout: Of the UNet.
        dtype: float16 or float32.
        base_digest: Digest of the base it was trained on.

    Raises:
        BankError: A layer is none of the layout's targets, or does not fit in `dtype`. Nothing
            of an adapter is left out.
    """
    known = {path for group in layout.groups for path in group.targets}
    if foreign := sorted(layers.keys() - known):
        raise BankError(f"{foreign[0]} is no target of the bank ({len(foreign)} such layers)")
    rank = max((int(down.shape[0]) for down, _, _ in layers.values()), default=1)
    arrays: dict[str, FloatArray] = {}
    for group in layout.groups:
        count = len(group.targets)
        downs = np.zeros((count, rank, group.in_features), np.float32)
        ups = np.zeros((count, group.out_features, rank), np.float32)
        for index, path in enumerate(group.targets):
            if path in layers:
                down, up, alpha = layers[path]
                own = down.shape[0]
                downs[index, :own] = down
                ups[index, :, :own] = np.asarray(up, np.float32) * (alpha / own)
        for half, array in (("down", downs), ("up", ups)):
            with np.errstate(over="ignore"):
                packed = array.astype(dtype)
            if not np.isfinite(packed).all():
                raise BankError(f"a layer of group {group.name} does not fit in {np.dtype(dtype)}")
            arrays[f"{half}_{group.name}"] = packed
    return PackedAdapter(arrays, base_digest)


WeightedAdapters = Sequence[tuple[PackedAdapter, float]]
"""The adapters of one sample with their weights; ranks stack."""


def host_zeros(shape: tuple[int, ...]) -> FloatArray:
    """Make an array of zeros, float32."""
    return np.zeros(shape, np.float32)


def gather(
    samples: Sequence[WeightedAdapters],
    layout: BankLayout,
    *,
    max_rank: int = MAX_RANK,
    zeros: Zeros = host_zeros,
) -> dict[str, Any]:
    """Return the bank inputs of a batch; see `BankInputs.gather`."""
    return BankInputs(layout, max_rank=max_rank, zeros=zeros).gather(samples)


class BankInputs:
    """The bank inputs of one batch after another, in memory that they share.

    A sample that has the adapters that the one in its row had before costs nothing, and no batch
    asks the system for memory that one before had. Not for several threads at once.
    """

    def __init__(
        self, layout: BankLayout, *, max_rank: int = MAX_RANK, zeros: Zeros = host_zeros
    ) -> None:
        """Make it; memory comes with the first batch.

        Args:
            layout: Of the UNet.
            max_rank: Highest sum of ranks that the engine takes.
            zeros: Makes the inputs, of the kind that the adapters' arrays are of.
        """
        self._layout, self._max_rank, self._zeros = layout, max_rank, zeros
        self._memory: dict[str, Any] = {}  # flat, by input name
        self._room = 0  # rows times ranks that there is memory for
        self._rank = 0
        self._rows: list[WeightedAdapters | None] = []  # what each row holds now

    def gather(self, samples: Sequence[WeightedAdapters]) -> dict[str, Any]:
        """Return the inputs by name: down `[B, n, R, in]`, up `[B, n, out, R]`.

        R is the highest sum of ranks in the batch, at least 1. They are good until the next call.

        Args:
            samples: The adapters of each sample.

        Raises:
            BankError: A sample's ranks add up to more than the engine takes.
        """
        ranks = [sum(adapter.rank for adapter, _ in sample) for sample in samples]
        if max(ranks) > self._max_rank:
            raise BankError(
                f"ranks add up to {max(ranks)}; this engine takes at most {self._max_rank}"
            )
        rank, batch = max(1, *ranks), len(samples)
        self._reserve(batch, rank)
        inputs: dict[str, Any] = {}
        for group in self._layout.groups:
            count = len(group.targets)
            down, up = f"down_{group.name}", f"up_{group.name}"
            inputs[down] = self._view(down, (batch, count, rank, group.in_features))
            inputs[up] = self._view(up, (batch, count, group.out_features, rank))
        self._rows += [None] * (batch - len(self._rows))
        for row, sample in enumerate(samples):
            if self._rows[row] == sample:
                continue
            self._rows[row] = None  # until all of it is there
            for group in self._layout.groups:
                downs, ups = inputs[f"down_{group.name}"][row], inputs[f"up_{group.name}"][row]
                _fill(downs, ups, group.name, sample)
            self._rows[row] = list(sample)
        return inputs

    def _reserve(self, batch: int, rank: int) -> None:
        """Make room, and forget rows that are no rows any more."""
        if batch * rank > self._room:
            self._room, self._rows = batch * rank, []
            self._memory.clear()  # before there is more
            for group in self._layout.groups:
                ranks = self._room * len(group.targets)
                self._memory[f"down_{group.name}"] = self._zeros((ranks * group.in_features,))
                self._memory[f"up_{group.name}"] = self._zeros((ranks * group.out_features,))
        if rank != self._rank:
            self._rank, self._rows = rank, []

    def _view(self, name: str, shape: tuple[int, ...]) -> Any:
        return self._memory[name][: math.prod(shape)].reshape(shape)


def _fill(downs: Any, ups: Any, group: str, sample: WeightedAdapters) -> None:
    """Put a sample's adapters into its row: down `[n, R, in]`, up `[n, out, R]`."""
    start = 0
    for adapter, weight in sample:
        stop = start + adapter.rank
        downs[:, start:stop] = adapter.arrays[f"down_{group}"]
        part = ups[..., start:stop]
        part[...] = adapter.arrays[f"up_{group}"]
        if weight != 1.0:
            part *= weight
        start = stop
    downs[:, start:] = 0
    ups[..., start:] = 0
