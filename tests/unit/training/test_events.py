"""What TensorBoard shows of a run."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toile.core.jobs.samples import Sample, SampleSet
from toile.training.checkpoint import Checkpoint
from toile.training.events import copy_events, writing
from toile.training.loop import StepReport
from unit.training.event_files import shown


def write(folder: Path, start: Checkpoint | None, losses: Sequence[float]) -> None:
    first = 1 if start is None else start.step + 1
    with writing(folder, start) as told:
        for step, loss in enumerate(losses, start=first):
            validation = loss / 2 if step % 2 == 0 else None
            told.step(StepReport(step, 9, 0.0, loss, 0.001 * step, 8.0, 1.0, validation))


def after(step: int) -> Checkpoint:
    losses = [0.1 * number for number in range(1, step + 1)]
    return Checkpoint(step, {}, {}, losses=losses, validations={2: 0.5})


def test_every_figure_has_its_series(tmp_path: Path) -> None:
    write(tmp_path, None, [0.5, 0.25])
    assert shown(tmp_path) == {
        "loss": [(1, 0.5), (2, 0.25)],
        "learning_rate": [(1, 0.001), (2, 0.002)],
        "images_per_second": [(1, 8.0), (2, 8.0)],
        "validation_loss": [(2, 0.125)],
    }


@pytest.mark.parametrize("start", [None, after(2)])
def test_an_attempt_goes_on_in_the_same_series(tmp_path: Path, start: Checkpoint | None) -> None:
    done = 0 if start is None else start.step
    write(tmp_path, None, [1.0, 2.0, 3.0, 4.0, 5.0])  # and then it is lost
    time.sleep(1.1)  # TensorBoard has files in the order of the seconds in their names
    write(tmp_path, start, [10.0, 20.0])
    found = shown(tmp_path)
    expected = [*[(1, 1.0), (2, 2.0)][:done], (done + 1, 10.0), (done + 2, 20.0)]
    assert found["loss"] == expected
    assert [step for step, _ in found["learning_rate"]] == [step for step, _ in expected]


def test_on_another_machine_the_checkpoint_tells_of_the_losses(tmp_path: Path) -> None:
    write(tmp_path, after(3), [10.0])
    found = shown(tmp_path)
    assert found["loss"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 10.0)]
    assert found["validation_loss"] == [(2, 0.5), (4, 5.0)]
    assert found["learning_rate"] == [(4, 0.004)]


def test_what_was_told_can_be_read_at_once(tmp_path: Path) -> None:
    with writing(tmp_path, None) as told:
        told.step(StepReport(1, 9, 0.0, 0.5, 0.001, 8.0, 1.0))
        assert shown(tmp_path)["loss"] == [(1, 0.5)]


def test_a_disk_that_is_full_for_a_while_costs_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that may not grow takes the first bytes of a write, as one on a full disk does."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(tmp_path, None) as told:

        def tell(step: int) -> None:
            told.step(StepReport(step, 9, 0.0, step / 8, 0.001, 8.0, 1.0))

        tell(1)
        (file,) = tmp_path.iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, unlimited[1]))
        try:
            tell(2)
            tell(3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        tell(4)
    assert shown(tmp_path)["loss"] == [(1, 0.125), (4, 0.5)]
    assert caplog.text.count("events are lost from step 2 on") == 1
    assert "from step 3" not in caplog.text


def test_a_version_keeps_the_series_but_not_the_machines_name(tmp_path: Path) -> None:
    for start, losses in ((None, [1.0, 2.0, 3.0]), (after(2), [10.0])):
        write(tmp_path / "run", start, losses)
        time.sleep(1.1)
    copy_events(tmp_path / "run", tmp_path / "version")
    assert sorted(path.name for path in (tmp_path / "version").iterdir()) == [
        "events.out.tfevents.0000",
        "events.out.tfevents.0001",
    ]
    assert shown(tmp_path / "version") == shown(tmp_path / "run")
    assert shown(tmp_path / "version")["loss"] == [(1, 1.0), (2, 2.0), (3, 10.0)]


def test_samples_are_shown_with_their_scores(tmp_path: Path) -> None:
    drawn = SampleSet(4, [Sample("a", 0, {"style": 0.25}), Sample("b", 1, {"style": 0.75})])
    with writing(tmp_path, None) as told:
        told.samples(drawn, [Image.new("RGB", (8, 8)), Image.new("L", (8, 8))])
    assert shown(tmp_path) == {"sample_scores/style": [(4, 0.5)]}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["samples/00", "samples/01"]


def test_on_another_machine_the_checkpoint_tells_of_the_scores(tmp_path: Path) -> None:
    start = Checkpoint(
        3, {}, {}, losses=[0.1] * 3, judgements={2: [{"style": 0.5, "colour": None}]}
    )
    with writing(tmp_path, start) as told:
        assert told.lack(1)
    assert shown(tmp_path)["sample_scores/style"] == [(2, 0.5)]
    with writing(tmp_path, start) as told:
        assert (told.lack(3), told.lack(4)) == (False, True)
