"""What a job says of itself while it runs, as rows hold it."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Figure: TypeAlias = float | str | Mapping[str, float]

PROGRESS_FIGURES = frozenset(
    {
        "loss",
        "validation_loss",
        "learning_rate",
        "images_per_second",
        "seconds_left",
        "gpu_memory_bytes",
        "samples_step",
        "sample_scores",
        "best_samples_step",
        "message",
    }
)


def progress_dict(phase: str, step: int, total_steps: int, **figures: Figure) -> dict[str, Any]:
    """One report of progress; the keys are those of `toile.v1.JobProgress`."""
    unknown = figures.keys() - PROGRESS_FIGURES
    if unknown:
        raise TypeError(f"progress has no figure {sorted(unknown)}")
    return {"phase": phase, "step": step, "total_steps": total_steps, **figures}
