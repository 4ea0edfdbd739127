"""What is started, and how it is found again."""

import os
import socket
from pathlib import Path

import pytest

from toile.cli.connection import discover
from toile.cli.errors import NoPlatformError
from toile.cli.platform.plan import plan_platform, scratch_folder
from toile.cli.platform.ports import free_ports
from toile.cli.platform.state import (
    MARK,
    PartStatus,
    Paths,
    PlatformState,
    ProcessId,
    read_state,
    supervisor_lock,
    write_state,
)
from toile.core.settings import Settings
from toile.diffusion.triton.server import TritonEnvironment


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project="studio")


def state_of(pid: int, status: PartStatus) -> PlatformState:
    me = ProcessId.of(pid)
    assert me is not None
    names = ("dataset", "train", "generate", "rank", "refine")
    addresses = {f"{name}_address": f"127.0.0.1:{n}" for n, name in enumerate(names, start=1)}
    return PlatformState(id="x", supervisor=me, status=status, parts=(), addresses=addresses)


def test_every_child_gets_the_settings_the_addresses_and_the_mark(settings: Settings) -> None:
    plan = plan_platform(settings, "mark-1")
    by_name = {part.name: part for part in plan.parts}
    for part in plan.parts:
        assert part.environment[MARK] == "mark-1"
        assert part.environment["TOILE_PROJECT"] == "studio"
        assert part.environment["TOILE_RANK_ADDRESS"] == plan.addresses["rank_address"]
        assert part.environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert part.environment["PYTHONSAFEPATH"] == "1"
    port = by_name["rank"].environment["TOILE_PORT"]
    assert plan.addresses["rank_address"].endswith(f":{port}")
    assert by_name["models"].environment["RAY_ADDRESS"] == plan.ray_address
    assert "RAY_ADDRESS" not in by_name["ray"].environment


def test_with_triton_the_models_know_it_and_it_knows_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "triton" not in {part.name for part in plan_platform(settings, "mark-1").parts}
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    place = tmp_path / "env"
    plan = plan_platform(
        settings, "mark-1", TritonEnvironment(place, place / "site", place / "lib")
    )
    by_name = {part.name: part for part in plan.parts}
    triton, engines = by_name["triton"], by_name["engines"]
    assert by_name["models"].environment["TOILE_TRITON_ADDRESS"] == triton.address
    assert triton.environment["LD_LIBRARY_PATH"] == str(place / "lib")
    assert triton.environment[MARK] == "mark-1"
    assert not any(name.startswith("TOILE_") for name in triton.environment if name != MARK)
    assert triton.background
    assert engines.background
    assert engines.again_with == "triton"
    assert set(engines.needs) == {"triton", "models"}


def test_no_two_parts_of_a_platform_share_a_port(settings: Settings) -> None:
    plan = plan_platform(settings, "mark-1")
    ray = next(part for part in plan.parts if part.name == "ray")
    ports = [
        option.rpartition("=")[2]
        for option in ray.command
        if "port=" in option and not option.endswith("=0")
    ]
    ports += [a.rpartition(":")[2] for a in plan.addresses.values() if not a.startswith("http")]
    ports += [p.metrics_address.rpartition(":")[2] for p in plan.parts if p.name != "ray"]
    ports = [port for port in ports if port]
    assert len(ports) == len(set(ports)) >= 19


def test_ports_that_are_taken_are_not_given_out() -> None:
    taken = free_ports("127.0.0.1", 3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken[0]))
        for _ in range(20):
            assert taken[0] not in free_ports("127.0.0.1", 50)


def test_rays_folder_is_short_for_any_home(tmp_path: Path) -> None:
    deep = Settings(home=tmp_path / ("a-very-long-name" * 8))
    other = Settings(home=tmp_path / "other")
    assert len(str(scratch_folder(deep))) <= 40
    assert scratch_folder(deep) == scratch_folder(deep)
    assert scratch_folder(deep) != scratch_folder(other)


def test_only_one_supervisor_holds_the_lock(settings: Settings) -> None:
    lock = Paths.of(settings).lock
    with supervisor_lock(lock) as first, supervisor_lock(lock) as second:
        assert first
        assert not second
    with supervisor_lock(lock) as again:
        assert again


def test_addresses_come_from_the_running_platform_unless_they_are_set(settings: Settings) -> None:
    path = Paths.of(settings).state
    path.parent.mkdir(parents=True)
    write_state(path, state_of(os.getpid(), PartStatus.READY))
    found = discover(settings.model_copy(update={"rank_address": "elsewhere:1"}))
    assert found.dataset_address == "127.0.0.1:1"
    assert found.rank_address == "elsewhere:1"


@pytest.mark.parametrize("content", ["", "{", '{"id": 1}'])
def test_a_state_file_that_cannot_be_read_is_no_platform(settings: Settings, content: str) -> None:
    path = Paths.of(settings).state
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert read_state(path) is None
    with pytest.raises(NoPlatformError, match="toile up"):
        discover(settings)


def test_a_platform_that_is_still_starting_is_not_used(settings: Settings) -> None:
    path = Paths.of(settings).state
    path.parent.mkdir(parents=True)
    write_state(path, state_of(os.getpid(), PartStatus.STARTING))
    with pytest.raises(NoPlatformError, match="starting, not ready"):
        discover(settings)


def test_the_state_of_a_dead_supervisor_is_no_platform(settings: Settings) -> None:
    path = Paths.of(settings).state
    path.parent.mkdir(parents=True)
    state = state_of(os.getpid(), PartStatus.READY)
    dead = state.supervisor.model_copy(update={"created": 1.0})
    write_state(path, state.model_copy(update={"supervisor": dead}))
    with pytest.raises(NoPlatformError):
        discover(settings)
