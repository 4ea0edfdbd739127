"""What supervisors may ask of every launcher."""

import pytest

from toile.core.errors import ComputeUnavailableError
from toile.core.jobs.launcher import JobLauncher, Submission, open_launcher
from toile.core.jobs.ray_jobs import RayJobs
from toile.core.settings import Settings
from unit.core.jobs.fake_compute import FakeCompute

ID = "0123abcd-1"


@pytest.fixture
def launcher(settings: Settings, compute: FakeCompute) -> JobLauncher:
    return open_launcher(compute.pointed_at(settings))


def submit(launcher: JobLauncher, argument: str = "projects/p/jobs/1") -> None:
    launcher.submit(
        ID,
        "toile.training",
        [argument, "1"],
        environment={"TOILE_LOG_LEVEL": "debug", "ODD": "$(HOME) costs $5"},
        labels={"project": "p", "job": "1", "kind": "TRAINING"},
    )


def test_a_submission_is_taken_once(launcher: JobLauncher, compute: FakeCompute) -> None:
    submit(launcher)
    submit(launcher, "another")
    assert compute.submitted() == [ID]
    assert compute.command(ID).endswith(" -P -m toile.training projects/p/jobs/1 1")
    assert compute.variables(ID)["TOILE_LOG_LEVEL"] == "debug"


def test_what_is_known_of_a_submission(launcher: JobLauncher, compute: FakeCompute) -> None:
    assert launcher.get(ID) is None
    submit(launcher)
    known = launcher.get(ID)
    assert known is not None
    assert not known.ended
    compute.say(ID, "RUNNING", "it runs")
    assert launcher.get(ID) == Submission(ended=False, message="it runs")
    for status in ("SUCCEEDED", "FAILED", "STOPPED"):
        compute.say(ID, status, "exit code 1")
        assert launcher.get(ID) == Submission(ended=True, message="exit code 1")


def test_stop(launcher: JobLauncher, compute: FakeCompute) -> None:
    submit(launcher)
    launcher.stop(ID)
    assert compute.stopped == [ID]


def test_logs_are_kept_as_long_as_the_submission_is(
    launcher: JobLauncher, compute: FakeCompute
) -> None:
    submit(launcher)
    compute.write_log(ID, "step 1\n")
    compute.write_log(ID, "schön\n")
    assert launcher.logs(ID) == "step 1\nschön\n"
    assert launcher.logs("another-1") is None


def test_compute_that_is_away_is_named(settings: Settings, compute: FakeCompute) -> None:
    open_launcher(compute.pointed_at(settings)).check()
    launcher = open_launcher(compute.away(settings))
    for call in (
        launcher.check,
        lambda: submit(launcher),
        lambda: launcher.get(ID),
        lambda: launcher.logs(ID),
        lambda: launcher.stop(ID),
    ):
        with pytest.raises(ComputeUnavailableError, match=f"{launcher.compute} does not answer"):
            call()


def test_a_cluster_must_be_configured() -> None:
    with pytest.raises(ComputeUnavailableError, match="no Ray cluster"):
        RayJobs("").check()
