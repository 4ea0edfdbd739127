"""The adapter bank: LoRAs as inputs of the UNet, one set for each sample of a batch.

The targeted Linears of a UNet are put in groups by (in, out). Of a group, an adapter holds two
arrays, `down [n, r, in]` and `up [n, out, r]`, with alpha / rank multiplied into `up`; a target
that it leaves alone is zeros. For a batch they become `down [B, n, R, in]` and `up [B, n, out, R]`:
the ranks of a sample's adapters stand behind one another, their weights multiplied into `up`, and
zeros fill what is left, so a sample computes `W x + up (down x)`, and one without adapters `W x`.

NumPy alone, because a server's Python has no torch; with one that has, the arrays may be tensors.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MAX_RANK = 64
"""Highest sum of the ranks of a sample's adapters that can be served."""

_FORMAT = "1"

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
        """Read a packed file; mapped in, so that nothing is read twice.

        Raises:
            BankError: It is no packed file, or was packed for another layout.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                if facts.get("toile.bank.format") != _FORMAT:
                    raise BankError(f"{path.name} is not a packed adapter of format {_FORMAT}")
                if BankLayout.from_json(facts["toile.bank.layout"]) != layout:
                    raise BankError(f"{path.name} was packed for a UNet with other targets")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError) as error:
            raise BankError(f"{path.name} is not a packed adapter: {error}") from error
        if set(arrays) != set(layout.input_names):
            raise BankError(f"{path.name} lacks arrays of its layout")
        return cls(arrays, facts.get("toile.base_digest", ""))


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
    """Return the bank inputs of a batch, by name: down `[B, n, R, in]`, up `[B, n, out, R]`.

    R is the highest sum of ranks in the batch, at least 1.

    Args:
        samples: The adapters of each sample.
        layout: Of the UNet.
        max_rank: Highest sum of ranks that the engine takes.
        zeros: Makes the inputs, of the kind that the adapters' arrays are of.

    Raises:
        BankError: A sample's ranks add up to more than `max_rank`.
    """
    ranks = [sum(adapter.rank for adapter, _ in sample) for sample in samples]
    if max(ranks) > max_rank:
        raise BankError(f"ranks add up to {max(ranks)}; this engine takes at most {max_rank}")
    rank, batch = max(1, *ranks), len(samples)
    inputs: dict[str, Any] = {}
    for group in layout.groups:
        count = len(group.targets)
        downs = zeros((batch, count, rank, group.in_features))
        ups = zeros((batch, count, group.out_features, rank))
        for row, sample in enumerate(samples):
            start = 0
            for adapter, weight in sample:
                stop = start + adapter.rank
                downs[row, :, start:stop] = adapter.arrays[f"down_{group.name}"]
                part = ups[row, ..., start:stop]
                part[...] = adapter.arrays[f"up_{group.name}"]
                part *= weight
                start = stop
        inputs[f"down_{group.name}"], inputs[f"up_{group.name}"] = downs, ups
    return inputs
