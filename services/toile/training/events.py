"""A run's figures as event files, which TensorBoard shows while it trains and afterwards."""

import contextlib
import errno
import io
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from toile.core.context import new_id
from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import SampleSet, mean_scores
from toile.training.checkpoint import Checkpoint
from toile.training.loop import StepReport

EVENTS_FOLDER = "tensorboard"
_FILES = "*tfevents*"
_log = logging.getLogger(__name__)


def events_path(job: JobContext) -> Path:
    """The folder of the job's events: on this machine, from its first attempt to its version."""
    return job.settings.home_path / EVENTS_FOLDER / job.name.rpartition("/")[2]


class Events:
    """Writes what a run has to show into event files.

    A disk that is full costs events: those that find no room are logged as lost, and no more.
    """

    def __init__(self, file: "_EventFile", *, first_step: int) -> None:
        """Take a file beside those that show nothing of `first_step` and what follows."""
        self._file = file
        self._first_step = first_step
        self._loses = False

    def lack(self, step: int) -> bool:
        """Say whether nothing is shown of a step, even if it was written once."""
        return step >= self._first_step

    def step(self, report: StepReport) -> None:
        """Write the figures of a step."""
        self._write(report.step, _scalars(figures(report)))

    def samples(self, drawn: SampleSet, images: Sequence[Image.Image]) -> None:
        """Write samples and, where they were judged, their mean scores."""
        shown = [_image(f"samples/{index:02d}", image) for index, image in enumerate(images)]
        self._write(drawn.step, [*shown, *_scalars(_score_names(drawn.mean_scores))])

    def earlier(self, start: Checkpoint) -> None:
        """Write what a checkpoint knows of the steps before it."""
        for step, loss in enumerate(start.losses, start=1):
            self._write(step, _scalars({"loss": loss}))
        for step, loss in start.validations.items():
            self._write(step, _scalars({"validation_loss": loss}))
        for step, images in start.judgements.items():
            self._write(step, _scalars(_score_names(mean_scores(images))))

    def _write(self, step: int, values: Sequence[Summary.Value]) -> None:
        if not values:
            return
        try:
            self._file.write(step, values)
            self._loses = False
        except OSError as error:
            if not self._loses:
                _log.warning("events are lost from step %d on: %s", step, error)
            self._loses = True


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
    done = 0 if start is None else start.step
    is_new = not any(folder.glob(_FILES))
    file = _EventFile(folder, purge_step=None if is_new else done + 1)
    events = Events(file, first_step=0 if is_new else done + 1)
    try:
        if start is not None and is_new:
            events.earlier(start)
        yield events
    finally:
        file.close()


class _EventFile:
    """An event file, each write of which is there whole or not at all.

    TensorBoard's own writer is a thread that ends with the first write that fails, and leaves half
    of it in the file, behind which nothing is read.
    """

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        """Name a file; it is made with its first write.

        Args:
            folder: Where it is.
            purge_step: First step of which no file before this one is shown; None to show all.
        """
        # TensorBoard reads files in the order of their names, and the seconds come first.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{new_id()}"
        self._path = folder / name
        self._purge_step = purge_step
        self._file: io.FileIO | None = None
        self._length = 0

    def write(self, step: int, values: Sequence[Summary.Value]) -> None:
        """Write a step's values to the disk.

        At once: a process that is killed must have written all that its checkpoint counts.

        Raises:
            OSError: There is no room; nothing of them is written.
        """
        records = io.BytesIO()
        told = [Event(step=step, summary=Summary(value=values))]
        for event in told if self._length else [*self._head(), *told]:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._append(records.getvalue())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _head(self) -> list[Event]:
        head = [Event(file_version="brain.Event:2")]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            head.append(Event(step=self._purge_step, session_log=start))
        return head

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._length)
            raise
        self._length += len(data)


def _scalars(values: Mapping[str, float]) -> list[Summary.Value]:
    return [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]


def _image(name: str, image: Image.Image) -> Summary.Value:
    png = io.BytesIO()
    image.convert("RGB").save(png, "PNG")
    shown = Summary.Image(
        height=image.height,
        width=image.width,
        colorspace=3,
        encoded_image_string=png.getvalue(),
    )
    return Summary.Value(tag=name, image=shown)


def _score_names(means: Mapping[str, float]) -> dict[str, float]:
    return {f"sample_scores/{scorer}": mean for scorer, mean in means.items()}


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
