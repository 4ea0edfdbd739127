"""A run's figures as event files, which TensorBoard shows while it trains and afterwards."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import SampleSet, mean_scores
from toile.training.checkpoint import Checkpoint
from toile.training.loop import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS_FOLDER = "tensorboard"
_FILES = "*tfevents*"


def events_path(job: JobContext) -> Path:
    """The folder of the job's events: on this machine, from its first attempt to its version."""
    return job.settings.home_path / EVENTS_FOLDER / job.name.rpartition("/")[2]


class Events:
    """Writes what a run has to show into event files."""

    def __init__(self, writer: "SummaryWriter", *, first_step: int) -> None:
        """Take a writer of files that show nothing of `first_step` and what follows."""
        self._writer = writer
        self._first_step = first_step

    def lack(self, step: int) -> bool:
        """Say whether nothing is shown of a step, even if it was written once."""
        return step >= self._first_step

    def step(self, report: StepReport) -> None:
        """Write the figures of a step."""
        for name, value in figures(report).items():
            self.scalar(name, value, report.step)
        # Each step: a process that is killed must have written all that its checkpoint counts.
        self._writer.flush()

    def samples(self, drawn: SampleSet, images: Sequence[Image.Image]) -> None:
        """Write samples and, where they were judged, their mean scores."""
        for index, image in enumerate(images):
            pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"samples/{index:02d}", pixels, drawn.step, dataformats="HWC")
        self.scores(drawn.step, drawn.mean_scores)
        self._writer.flush()

    def scores(self, step: int, means: Mapping[str, float]) -> None:
        """Write the mean scores of samples."""
        for scorer, mean in means.items():
            self.scalar(f"sample_scores/{scorer}", mean, step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write a figure of a step."""
        self._writer.add_scalar(name, value, step)


@contextlib.contextmanager
def writing(folder: Path, start: Checkpoint | None) -> Iterator[Events]:
    """Open event files while the block runs; what is written goes on in the series there.

    What an earlier attempt wrote of steps that are done again is not shown any more. Where there
    is nothing of the steps before, as on another machine, their losses and scores come from
    the checkpoint; their rates, speeds and samples are not known.

    Args:
        folder: Where the event files are.
        start: Where the run goes on from; None for the beginning.
    """
    from torch.utils.tensorboard import SummaryWriter  # late: it takes half a second

    done = 0 if start is None else start.step
    is_new = not any(folder.glob(_FILES))
    writer = SummaryWriter(str(folder), purge_step=None if is_new else done + 1)
    events = Events(writer, first_step=0 if is_new else done + 1)
    try:
        if start is not None and is_new:
            for step, loss in enumerate(start.losses, start=1):
                events.scalar("loss", loss, step)
            for step, loss in start.validations.items():
                events.scalar("validation_loss", loss, step)
            for step, images in start.judgements.items():
                events.scores(step, mean_scores(images))
        yield events
    finally:
        writer.close()


def figures(report: StepReport) -> dict[str, float]:
    """What a step adds to its series, by their names."""
    found = {
        "loss": report.step_loss,
        "learning_rate": report.learning_rate,
        "images_per_second": report.images_per_second,
    }
    if report.validation_loss is not None:
        found["validation_loss"] = report.validation_loss
    return found


def copy_events(source: Path, folder: Path) -> None:
    """Copy event files to where a version keeps them, in order, without the machine's name."""
    folder.mkdir()
    for number, file in enumerate(sorted(source.glob(_FILES))):
        shutil.copyfile(file, folder / f"events.out.tfevents.{number:04d}")
