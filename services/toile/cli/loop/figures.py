"""What a loop took, beside what it should take."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from toile.cli.loop.memory import MemorySampler
from toile.cli.loop.runner import Outcome
from toile.cli.output import Output, duration_text, size_text
from toile.cli.platform.launcher import Started

# For the sample loop on two cores and 24 GiB without a GPU.
TARGET_SECONDS = 6 * 60.0
TARGET_MEMORY_BYTES = 8 << 30
TARGET_UP_SECONDS = 45.0


@dataclass(frozen=True)
class StepFigures:
    """One step's share."""

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Figures:
    """All that was measured. A figure that could not be measured is None.

    Attributes:
        steps: In order; the steps done before an interruption count with the time they took.
        total_seconds: Starting the platform, the steps and the report.
        peak_memory_bytes: Of all processes of the platform and of this one, together.
        up_seconds: From `toile up` until everything was ready.
        taken_up: Whether steps of an earlier, interrupted run were kept.
    """

    steps: tuple[StepFigures, ...]
    total_seconds: float
    peak_memory_bytes: int | None
    up_seconds: float | None
    taken_up: bool

    @classmethod
    def of(
        cls,
        outcome: Outcome,
        memory: MemorySampler,
        started: Started | None,
        began: float,
        report_began: float,
    ) -> Self:
        """Put together what was measured; `began` and `report_began` are monotonic."""
        now = time.monotonic()
        steps = [
            StepFigures(key, record.seconds, record.peak_memory_bytes)
            for key, record in outcome.records.items()
        ]
        steps.append(StepFigures("report", now - report_began, memory.take_step_peak()))
        up = started.state.ready_seconds if started is not None and started.ours else None
        total = now - began
        if outcome.taken_up:
            total = sum(step.seconds for step in steps) + (up or 0.0)
        peak = max((step.peak_memory_bytes for step in steps), default=0)
        peak = max(peak, memory.peak_bytes)
        return cls(tuple(steps), total, peak or None, up, outcome.taken_up)

    def as_data(self, out: Path) -> dict[str, Any]:
        """Return what JSON holds."""
        return {
            "out": str(out),
            "total_seconds": round(self.total_seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "up_seconds": self.up_seconds,
            "taken_up": self.taken_up,
            "steps": [
                {
                    "name": step.name,
                    "seconds": round(step.seconds, 2),
                    "peak_memory_bytes": step.peak_memory_bytes or None,
                }
                for step in self.steps
            ],
        }

    def against_targets(self) -> list[tuple[str, str, str, bool]]:
        """Return name, figure, target and whether it is met, for what was measured."""
        rows = [
            (
                "whole loop",
                duration_text(self.total_seconds),
                duration_text(TARGET_SECONDS),
                self.total_seconds <= TARGET_SECONDS,
            )
        ]
        if self.peak_memory_bytes is not None:
            rows.append(
                (
                    "peak memory",
                    size_text(self.peak_memory_bytes),
                    size_text(TARGET_MEMORY_BYTES),
                    self.peak_memory_bytes <= TARGET_MEMORY_BYTES,
                )
            )
        if self.up_seconds is not None:
            rows.append(
                (
                    "toile up",
                    duration_text(self.up_seconds),
                    duration_text(TARGET_UP_SECONDS),
                    self.up_seconds <= TARGET_UP_SECONDS,
                )
            )
        return rows


def show_figures(output: Output, figures: Figures, out: Path) -> None:
    """Write the tables that close a loop."""
    if output.as_json:
        return
    steps = Table(box=None, pad_edge=False, header_style="bold")
    steps.add_column("step")
    steps.add_column("time", justify="right")
    steps.add_column("peak memory", justify="right")
    for step in figures.steps:
        held = size_text(step.peak_memory_bytes) if step.peak_memory_bytes else "-"
        steps.add_row(step.name, duration_text(step.seconds), held)
    targets = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("figure", "measured", "target"):
        targets.add_column(column, justify="left" if column == "figure" else "right")
    for name, measured, target, met in figures.against_targets():
        targets.add_row(name, f"[{'green' if met else 'yellow'}]{measured}[/]", f"≤ {target}")
    output.say("")
    output.console.print(steps)
    output.say("")
    output.console.print(targets)
    if figures.taken_up:
        output.say(
            "[dim]Steps of an interrupted run count with the time that they took then.[/dim]"
        )
    output.say(f"\n[bold]{out / 'report.html'}[/bold] shows all of it on one page.")
