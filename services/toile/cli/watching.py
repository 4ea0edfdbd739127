"""Progress of long work, drawn on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from toile.cli.names import short
from toile.cli.operations import follow_job
from toile.cli.output import Output, duration_text, size_text
from toile.core.rpc.client import Clients
from toile.v1 import generate_pb2, job_pb2

_WAITS = {
    job_pb2.JOB_STATE_QUEUED: "waiting for compute",
    job_pb2.JOB_STATE_PAUSED: "paused",
}


def make_progress(output: Output) -> Progress:
    """Return a display of bars with free text at their end."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=output.notes,
        transient=True,
        disable=not output.notes.is_terminal,
    )


@contextmanager
def bar(output: Output, description: str, total: float | None) -> Iterator["Bar"]:
    """Show one bar for the length of a block."""
    with make_progress(output) as progress:
        yield Bar(progress, progress.add_task(description, total=total, figures=""))


class Bar:
    """One bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._phase = ""

    def advance(self, figures: str = "") -> None:
        """One more is done."""
        self._progress.update(self._task, advance=1, figures=escape(figures))

    def show_job(self, event: job_pb2.JobEvent) -> None:
        """Show where a job is."""
        waits = _WAITS.get(event.state, "")
        if not event.HasField("progress"):
            if waits:
                self._progress.update(self._task, figures=waits)
            return
        progress = event.progress
        if progress.phase != self._phase:
            self._phase = progress.phase
            self._progress.reset(self._task, description=escape(progress.phase or "job"))
        self._progress.update(
            self._task,
            completed=progress.step,
            total=progress.total_steps or None,
            figures=escape(" · ".join(filter(None, (waits, job_figures(progress))))),
        )

    def show_step(self, images_done: int, count: int, step: generate_pb2.StepProgress) -> None:
        """Show where a generation is, in steps over all its images."""
        total = step.total_steps or 1
        figures = f"image {min(images_done + 1, count)} of {count}"
        self._progress.update(
            self._task,
            completed=step.image_index * total + step.step,
            total=count * total,
            figures=figures,
        )


def job_figures(progress: job_pb2.JobProgress) -> str:
    """Write the figures of a job that it knows."""
    parts = []
    if progress.HasField("loss"):
        parts.append(f"loss {progress.loss:.4f}")
    if progress.HasField("validation_loss"):
        parts.append(f"validation {progress.validation_loss:.4f}")
    if progress.HasField("samples_step"):
        parts.append(f"samples of step {progress.samples_step}")
    if progress.HasField("best_samples_step"):
        parts.append(f"best of step {progress.best_samples_step}")
    if progress.HasField("images_per_second"):
        parts.append(f"{progress.images_per_second:.1f} images/s")
    if progress.HasField("gpu_memory_bytes"):
        parts.append(f"GPU {size_text(progress.gpu_memory_bytes)}")
    if progress.HasField("seconds_left"):
        parts.append(f"{duration_text(progress.seconds_left)} left")
    if progress.message:
        parts.append(progress.message)
    return " · ".join(parts)


def watch_job(clients: Clients, name: str, output: Output) -> job_pb2.Job:
    """Follow a job with a bar; a pause is waited out.

    Raises:
        JobFailedError: It failed.
        CancelledError: It was cancelled.
    """
    with bar(output, "queued", None) as line:

        def is_paused() -> bool:
            """Whether it is so now: a history that is read again tells of old pauses, too."""
            job = clients.jobs.GetJob(job_pb2.GetJobRequest(name=name)).job
            return bool(job.state == job_pb2.JOB_STATE_PAUSED)

        def show(event: job_pb2.JobEvent) -> None:
            line.show_job(event)
            if event.state == job_pb2.JOB_STATE_PAUSED and is_paused():
                output.note(f"The job is paused. Go on with: toile jobs resume {short(name)}")

        return follow_job(clients, name, show)
