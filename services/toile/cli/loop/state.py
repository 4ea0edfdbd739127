"""What a loop has done so far, in its output folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toile.core.context import new_id

STATE_FILE = ".loop.json"


class StepRecord(BaseModel):
    """A finished step. `digest` covers its inputs, those of the steps before included."""

    model_config = ConfigDict(frozen=True)

    digest: str
    seconds: float
    peak_memory_bytes: int = 0
    result: dict[str, Any] = Field(default_factory=dict)


class LoopState(BaseModel):
    """Finished steps, and how often each was begun anew after it was cancelled or failed."""

    run: str = Field(default_factory=new_id)
    steps: dict[str, StepRecord] = Field(default_factory=dict)
    attempts: dict[str, int] = Field(default_factory=dict)
    finished: bool = False

    @classmethod
    def load(cls, out: Path) -> "LoopState":
        """Return the state of an output folder, a fresh one if it has none."""
        try:
            return cls.model_validate_json((out / STATE_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls()

    def save(self, out: Path) -> None:
        """Write the state; a reader sees the old one or the new one, whole."""
        out.mkdir(parents=True, exist_ok=True)
        part = out / f"{STATE_FILE}.part"
        part.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        part.replace(out / STATE_FILE)

    def request_id(self, step: str, digest: str) -> str:
        """Return the id that a step's request has, however often this run is taken up again."""
        text = f"{self.run}/{step}/{digest}/{self.attempts.get(step, 0)}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def begin_anew(self, step: str) -> None:
        """Give the step another request id: what it started has ended without a result."""
        self.attempts[step] = self.attempts.get(step, 0) + 1


def chain_digest(before: str, inputs: object) -> str:
    """Return the digest of a step's inputs on top of those of the step before."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
