"""What pods of a job run before they are ended."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.jobs import JobState, JobStore, leaving
from toile.core.settings import Settings

MODULE = "toile.core.jobs.leaving"


def start(settings: Settings, job: str, attempt: int, **variables: str) -> "subprocess.Popen[str]":
    environment: Mapping[str, str] = {**os.environ, **settings.environment(), **variables}
    command = [sys.executable, "-P", "-m", MODULE, job, str(attempt)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_pod_waits_until_the_training_has_left(
    settings: Settings, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    # Head and worker are told at once, as when their nodes are drained together.
    pods = [start(settings, job, 1) for _ in range(2)]
    while not jobs.heartbeat(job, 1).to_stop:
        time.sleep(0.05)
    time.sleep(0.5)
    assert all(pod.poll() is None for pod in pods)
    jobs.stop(job, attempt=1)  # as a training does that has kept its checkpoint
    for pod in pods:
        assert (pod.wait(20), pod.communicate()[1]) == (0, "")
    row = jobs.get(job)
    assert (row.state, row.attempt, row.leave_requested) == (JobState.QUEUED, 2, False)


def test_a_pod_of_an_attempt_that_is_over_waits_for_nothing(
    settings: Settings, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    jobs.next_attempt(job, after=1)
    pod = start(settings, job, 1)
    assert (pod.wait(20), pod.communicate()[1]) == (0, "")
    assert not jobs.get(job).leave_requested


def test_a_training_that_ends_instead_is_not_waited_for(
    catalog: Catalog, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    waiting = threading.Thread(target=leaving.leave, args=(jobs, job, 1))
    waiting.start()
    while not jobs.heartbeat(job, 1).to_stop:
        time.sleep(0.05)
    with catalog.transaction() as session:
        jobs.succeed(session, job, 1)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_training_that_does_not_leave_is_waited_for_so_long(
    jobs: JobStore, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    monkeypatch.setattr(leaving, "LEAVE_SECONDS", 0.3)
    waiting = threading.Thread(target=leaving.leave, args=(jobs, job, 1))
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert jobs.heartbeat(job, 1).to_stop, "it may still"


def test_a_pod_that_cannot_tell_the_training_says_why(settings: Settings, job: str) -> None:
    nowhere = start(settings, job, 1, TOILE_CATALOG_URL="postgresql+psycopg://toile@127.0.0.1:1/x")
    unknown = start(settings, f"{job}0", 1)
    for pod, why in ((nowhere, "catalog"), (unknown, "job")):
        told = pod.communicate(timeout=30)[1]
        assert pod.returncode == 1
        assert "is not told that its compute goes" in told
        assert why in told.lower()
        assert "Traceback" not in told
