"""Where a run stands: published whole or not at all, and never a pickle.

There is no state of random generators and no position in the data: both follow from the step
(`data.generator`, `data.batch_indices`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from toile.core.artifacts import ArtifactStore, delete_folder, fetch, publish
from toile.core.artifacts.manifest import MANIFEST
from toile.core.errors import AlreadyExistsError, DataLossError

KEPT = 2
_TENSORS = "state.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps.

    Attributes:
        step: Steps done.
        weights: What is trained, by name.
        optimizer: What `optimizers.optimizer_state` took.
        losses: Loss of every step done.
        average: Moving average of the parameters; empty if none is kept.
        validations: Loss of every validation, by its step.
        judgements: Scores of every set of samples that was judged, by its step.
        best: Weights of the best validation, or the best samples; empty before the first.
        scaler: State of the scaler of an fp16 run's loss; empty of others.
        skipped: Steps that changed no weights, for their fp16 gradients overflowed.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    losses: list[float] = field(default_factory=list)
    average: Mapping[str, Tensor] = field(default_factory=dict)
    validations: Mapping[int, float] = field(default_factory=dict)
    judgements: Mapping[int, Sequence[Mapping[str, float | None]]] = field(default_factory=dict)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    def to_files(self) -> dict[str, bytes]:
        """Serialise."""
        named = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        named |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        named |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for place, state in self.optimizer.items():
            named |= {f"optimizer.{place}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().contiguous() for name, tensor in named.items()}
        facts = {
            "step": self.step,
            "losses": self.losses,
            "validations": list(self.validations.items()),
            "judgements": list(self.judgements.items()),
            "scaler": dict(self.scaler),
            "skipped": self.skipped,
        }
        return {_TENSORS: save(tensors), _STATE: json.dumps(facts).encode()}

    @classmethod
    def from_folder(cls, folder: Path) -> "Checkpoint":
        """Deserialise."""
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        sets: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "best": {}}
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load((folder / _TENSORS).read_bytes()).items():
            kind, rest = key.split(".", 1)
            if kind in sets:
                sets[kind][rest] = tensor
            else:
                place, name = rest.split(".", 1)
                optimizer.setdefault(int(place), {})[name] = tensor
        return cls(
            step=int(state["step"]),
            optimizer=optimizer,
            losses=[float(loss) for loss in state["losses"]],
            validations={int(step): float(loss) for step, loss in state["validations"]},
            # Checkpoints of earlier versions have none.
            judgements={int(step): scores for step, scores in state.get("judgements", [])},
            scaler=state.get("scaler", {}),
            skipped=state.get("skipped", []),
            **sets,
        )


def save_checkpoint(store: ArtifactStore, prefix: str, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint and forget all but the newest `KEPT`.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
        DiskFullError: There is no room.
    """
    try:
        publish(store, _at(prefix, checkpoint.step), checkpoint.to_files())
    except AlreadyExistsError:
        return  # by a process of this job that was thought lost; runs repeat exactly
    for step in _steps(store, prefix)[:-KEPT]:
        delete_folder(store, _at(prefix, step))


def load_checkpoint(store: ArtifactStore, prefix: str, cache: Path) -> Checkpoint | None:
    """Return the newest sound checkpoint; None if there is none.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    for step in reversed(_steps(store, prefix)):
        try:
            return Checkpoint.from_folder(fetch(store, _at(prefix, step), cache))
        except DataLossError:
            continue  # the one before will do
    return None


def _at(prefix: str, step: int) -> str:
    return f"{prefix}/{step:08d}"


def _steps(store: ArtifactStore, prefix: str) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    start = len(prefix) + 1
    return sorted(
        int(info.key[start:].split("/")[0])
        for info in store.list(prefix + "/")
        if info.key.endswith("/" + MANIFEST)
    )
