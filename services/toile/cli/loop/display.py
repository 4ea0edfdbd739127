"""A loop on the screen: a line for each step that is done, a bar for the one that runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape

from toile.cli.output import Output, duration_text
from toile.cli.watching import Bar, bar, job_figures
from toile.v1 import job_pb2

_LINE_SECONDS = 15.0


class Display:
    """Writes to standard error, so that standard output stays the result's."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last_line = 0.0

    @contextmanager
    def running(self, title: str, total: float | None = None) -> Iterator[Bar]:
        """Show a bar while a step runs; where there is no terminal, a line."""
        if not self._output.notes.is_terminal:
            self._output.note(f"· {title}")
        with bar(self._output, title, total) as line:
            yield line

    def job_line(self, event: job_pb2.JobEvent) -> None:
        """Where there is no terminal, say now and then where a job is."""
        now = time.monotonic()
        if self._output.notes.is_terminal or now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        p = event.progress
        if p.phase:
            figures = escape(job_figures(p))
            self._output.note(f"    {escape(p.phase)} {p.step}/{p.total_steps} {figures}")

    def done(self, title: str, summary: str, seconds: float) -> None:
        """Say that a step is done."""
        self._output.note(
            f"[green]✓[/green] {title:<10} {escape(summary)}  [dim]{duration_text(seconds)}[/dim]"
        )

    def kept(self, title: str, summary: str) -> None:
        """Say that a step was done before."""
        self._output.note(f"[dim]✓ {title:<10} {escape(summary)}  (done before)[/dim]")

    def note(self, text: str) -> None:
        """Write a line."""
        self._output.note(text)
