"""A run's figures as event files, which TensorBoard shows while it trains and afterwards."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from toile.core.jobs.runtime import JobContext
from toile.training.checkpoint import Checkpoint
from toile.training.loop import StepReport

EVENTS_FOLDER = "tensorboard"
_FILES = "*tfevents*"


def events_path(job: JobContext) -> Path:
    """The folder of the job's events: on this machine, from its first attempt to its version."""
    return job.settings.home_path / EVENTS_FOLDER / job.name.rpartition("/")[2]


@contextlib.contextmanager
def writing(folder: Path, start: Checkpoint | None) -> Iterator[Callable[[StepReport], None]]:
    """Write the figures of each step while the block runs, in the series that are there.

    What an earlier attempt wrote of steps that are done again is not shown any more. Where there
    is nothing of the steps before, as on another machine, their losses come from the checkpoint;
    their rates and speeds are not known.

    Args:
        folder: Where the event files are.
        start: Where the run goes on from; None for the beginning.
    """
    from torch.utils.tensorboard import SummaryWriter  # late: it takes half a second

    done = 0 if start is None else start.step
    is_new = not any(folder.glob(_FILES))
    writer = SummaryWriter(str(folder), purge_step=None if is_new else done + 1)

    def scalar(name: str, value: float, step: int) -> None:
        writer.add_scalar(name, value, step)

    def write(report: StepReport) -> None:
        scalar("loss", report.step_loss, report.step)
        scalar("learning_rate", report.learning_rate, report.step)
        scalar("images_per_second", report.images_per_second, report.step)
        if report.validation_loss is not None:
            scalar("validation_loss", report.validation_loss, report.step)
        # Each step: a process that is killed must have written all that its checkpoint counts.
        writer.flush()

    try:
        if start is not None and is_new:
            for step, loss in enumerate(start.losses, start=1):
                scalar("loss", loss, step)
            for step, loss in start.validations.items():
                scalar("validation_loss", loss, step)
        yield write
    finally:
        writer.close()


def copy_events(source: Path, folder: Path) -> None:
    """Copy event files to where a version keeps them, in order, without the machine's name."""
    folder.mkdir()
    for number, file in enumerate(sorted(source.glob(_FILES))):
        shutil.copyfile(file, folder / f"events.out.tfevents.{number:04d}")
