"""The supervisor with small processes in place of Ray and the services."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from toile.cli.platform import keeper, processes
from toile.cli.platform.parts import Part, Plan
from toile.cli.platform.state import (
    MARK,
    PartState,
    PartStatus,
    Paths,
    PlatformState,
    ProcessId,
    read_state,
    write_state,
)
from toile.cli.platform.supervisor import Supervisor, remove_remains

# Becomes ready by making a file; with "stubborn" it ignores SIGTERM; leaves a child behind.
_SERVER = """
import pathlib, signal, subprocess, sys, time
name, ready, stubborn = sys.argv[1], pathlib.Path(sys.argv[2]), len(sys.argv) > 3
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
ready.touch()
time.sleep(300)
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "home")
    paths.logs.mkdir(parents=True)
    paths.state.parent.mkdir(parents=True)
    return paths


def environment(plan_id: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], MARK: plan_id}


def server(tmp_path: Path, name: str, plan_id: str, *extra: str, **fields: object) -> Part:
    ready = tmp_path / f"{name}.ready"

    async def probe() -> bool:
        return ready.exists()

    return Part(
        name,
        (sys.executable, "-c", _SERVER, name, str(ready), *extra),
        environment(plan_id),
        ready=probe,
        **fields,  # type: ignore[arg-type]
    )


def task(name: str, plan_id: str, code: str, **fields: object) -> Part:
    return Part(
        name,
        (sys.executable, "-c", code),
        environment(plan_id),
        **fields,  # type: ignore[arg-type]
    )


async def until(paths: Paths, wanted: Callable[[PlatformState], bool]) -> PlatformState:
    for _ in range(300):
        state = read_state(paths.state)
        if state is not None and wanted(state):
            return state
        await asyncio.sleep(0.05)
    raise AssertionError(f"it never came: {read_state(paths.state)}")


def is_ready(state: PlatformState) -> bool:
    return state.status is PartStatus.READY


def status_of(state: PlatformState, name: str) -> PartStatus:
    return next(part for part in state.parts if part.name == name).status


async def test_parts_come_up_in_order_and_nothing_is_left_when_it_stops(
    tmp_path: Path, paths: Paths
) -> None:
    plan_id = f"order-{time.time_ns()}"
    order = tmp_path / "order"
    note = f"open({str(order)!r}, 'a').write"

    at_farewell: list[PartStatus] = []

    async def bid_farewell() -> None:
        state = read_state(paths.state)
        assert state is not None
        at_farewell.extend(status_of(state, name) for name in ("dataset", "ray"))

    plan = Plan(
        plan_id,
        (
            task("catalog", plan_id, f"{note}('catalog ')"),
            server(tmp_path, "ray", plan_id, before_end=bid_farewell),
            task("models", plan_id, f"{note}('models ')", needs=("catalog", "ray")),
            server(tmp_path, "dataset", plan_id, "stubborn", needs=("catalog",), grace_seconds=0.5),
        ),
        scratch=tmp_path / "scratch",
    )
    running = asyncio.create_task(Supervisor(plan, paths).run())
    state = await until(paths, is_ready)
    assert order.read_text() == "catalog models "
    assert state.ready_seconds is not None
    assert len(processes.marked(plan_id)) == 4  # two servers and the child of each

    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert processes.marked(plan_id) == []
    assert not paths.state.exists()
    assert at_farewell == [PartStatus.STOPPED, PartStatus.READY]


async def test_a_part_that_ends_comes_back_and_tasks_run_again_with_what_they_follow(
    tmp_path: Path, paths: Paths
) -> None:
    plan_id = f"again-{time.time_ns()}"
    runs = tmp_path / "runs"
    plan = Plan(
        plan_id,
        (
            server(tmp_path, "ray", plan_id),
            task(
                "models",
                plan_id,
                f"open({str(runs)!r}, 'a').write('x')",
                needs=("ray",),
                again_with="ray",
            ),
            server(tmp_path, "dataset", plan_id),
        ),
        scratch=tmp_path / "scratch",
    )
    running = asyncio.create_task(Supervisor(plan, paths).run())
    state = await until(paths, is_ready)
    before = {part.name: part.process for part in state.parts}
    assert before["ray"] is not None
    psutil.Process(before["ray"].pid).kill()

    def is_back(state: PlatformState) -> bool:
        by_name = {part.name: part for part in state.parts}
        models = by_name["models"]
        return (
            by_name["ray"].restarts == 1
            and by_name["ray"].status is PartStatus.READY
            and models.restarts >= 1
            and models.status is PartStatus.READY
        )

    state = await until(paths, is_back)
    after = {part.name: part.process for part in state.parts}
    assert after["ray"] != before["ray"]
    assert after["dataset"] == before["dataset"]
    assert runs.read_text() == "xx"
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert processes.marked(plan_id) == []


async def test_a_part_in_the_background_is_not_waited_for_and_may_fail(
    tmp_path: Path, paths: Paths
) -> None:
    plan_id = f"background-{time.time_ns()}"
    runs = tmp_path / "runs"
    fails_once = (
        f"import sys; runs = open({str(runs)!r}, 'a+'); runs.seek(0); n = len(runs.read()); "
        "runs.write('x'); sys.exit(4 if n == 0 else 0)"
    )
    plan = Plan(
        plan_id,
        (
            server(tmp_path, "ray", plan_id),
            task(
                "engines",
                plan_id,
                fails_once,
                needs=("ray",),
                again_with="ray",
                background=True,
            ),
            task("never", plan_id, "import time; time.sleep(600)", background=True),
        ),
        scratch=tmp_path / "scratch",
    )
    running = asyncio.create_task(Supervisor(plan, paths).run())

    def of(state: PlatformState, name: str) -> PartState:
        return next(part for part in state.parts if part.name == name)

    state = await until(
        paths, lambda s: is_ready(s) and of(s, "engines").status is PartStatus.FAILED
    )
    assert of(state, "never").status is PartStatus.STARTING
    assert of(state, "engines").message == "ended with exit code 4"
    ray = of(state, "ray").process
    assert ray is not None
    psutil.Process(ray.pid).kill()
    state = await until(paths, lambda s: of(s, "engines").status is PartStatus.READY)
    assert runs.read_text() == "xx"
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert processes.marked(plan_id) == []


async def test_a_task_that_nothing_waits_for_takes_what_it_takes(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_FIRST_START_SECONDS", 0.2)
    plan_id = f"slow-{time.time_ns()}"
    slow = task("engines", plan_id, "import time; time.sleep(2)", background=True)
    plan = Plan(plan_id, (slow,), scratch=tmp_path / "scratch")
    running = asyncio.create_task(Supervisor(plan, paths).run())
    state = await until(paths, lambda s: status_of(s, "engines") is not PartStatus.STARTING)
    assert status_of(state, "engines") is PartStatus.READY, state
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def test_a_first_start_that_fails_stops_everything_and_says_which(
    tmp_path: Path, paths: Paths
) -> None:
    plan_id = f"fails-{time.time_ns()}"
    plan = Plan(
        plan_id,
        (
            server(tmp_path, "ray", plan_id),
            task("catalog", plan_id, "import sys; print('the disk is full'); sys.exit(4)"),
        ),
        scratch=tmp_path / "scratch",
    )
    assert await Supervisor(plan, paths).run() == 1
    state = read_state(paths.state)
    assert state is not None
    assert state.status is PartStatus.FAILED
    assert state.message == "catalog ended with exit code 4"
    assert "the disk is full" in paths.log("catalog").read_text()
    assert processes.marked(plan_id) == []


async def test_what_a_killed_supervisor_left_is_removed(tmp_path: Path, paths: Paths) -> None:
    plan_id = f"remains-{time.time_ns()}"
    left = await processes.start(("sleep", "300"), environment(plan_id), paths.log("ray"))
    stranger = await asyncio.create_subprocess_exec("sleep", "300")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    dead = ProcessId(pid=left.pid, created=1.0)  # the number was given away since
    assert dead.process() is None
    write_state(
        paths.state,
        PlatformState(
            id=plan_id,
            supervisor=dead,
            status=PartStatus.READY,
            parts=(),
            addresses={},
            scratch=str(scratch),
        ),
    )
    await asyncio.to_thread(remove_remains, paths)
    await left.wait()  # whoever killed it may have taken its status
    assert processes.marked(plan_id) == []
    assert stranger.returncode is None
    assert not scratch.exists()
    assert not paths.state.exists()
    stranger.kill()
    await stranger.wait()
