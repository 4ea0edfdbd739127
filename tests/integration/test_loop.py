"""A small loop from end to end by the command."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from integration.platform_home import PATIENCE_SECONDS, Home, nothing_left
from toile.cli.loop.state import STATE_FILE
from toile.imaging.png import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE_SECONDS)]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Path) -> Iterator[Home]:
    """A home where nothing runs yet."""
    home = Home(tmp_path / "home", tiny_bundle)
    yield home
    home.toile("down")


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    """The lace loop with a few photographs and as few steps as possible."""
    content = yaml.safe_load((EXAMPLES / "lace" / "loop.yaml").read_text())
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for path in sorted((EXAMPLES / "lace" / "photos").glob("*.jpg"))[:6]:
        (photographs / path.name).write_bytes(path.read_bytes())
    content["out"] = "out"
    content["dataset"]["folder"] = photographs.name
    content["train"].update(steps=4, checkpoint_interval_steps=2, batch_size=2)
    few = {"count": 2, "steps": 2, "refiner": {"strength": 0.5}}
    content["generate"].update(few, prompts=content["generate"]["prompts"][:2])
    content["rank"] = {"keep": 2}
    content["refine"]["steps"] = 2
    path = tmp_path / "loop.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read_steps(out: Path) -> set[str]:
    try:
        return set(json.loads((out / STATE_FILE).read_text())["steps"])
    except (FileNotFoundError, json.JSONDecodeError):
        return set()


def interrupt_when(running: subprocess.Popen[str], out: Path, step: str) -> None:
    """Press Ctrl-C soon after a step was finished, in the middle of the next."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while step not in read_steps(out) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()
        time.sleep(0.2)
    time.sleep(3.0)
    running.send_signal(signal.SIGINT)


def test_a_loop_that_is_interrupted_stops_cleanly_and_goes_on(
    home: Home, loop: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        home.command("run", loop),
        env=home.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    interrupt_when(running, out, "build")
    mark = home.platform_id()
    _, notes = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 130, notes
    assert "goes on from there" in notes
    assert "build" in read_steps(out)
    assert nothing_left(mark)

    figures = home.json("run", loop)
    assert figures["taken_up"] is True
    assert figures["peak_memory_bytes"] > 0
    assert home.toile("status").returncode == 3  # it stopped what it started
    check_results(out)


def check_results(out: Path) -> None:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert len(summary["designs"]) == 4
    metadata = read((out / summary["designs"][0]["file"]).read_bytes())
    assert metadata.parameters is not None
    assert metadata.parameters.seed == summary["designs"][0]["seed"]
    best = Image.open(out / summary["designs"][0]["file"]).convert("RGB")
    refined = Image.open(out / summary["refined"]["file"]).convert("RGB")
    assert best.size == refined.size
    assert "make it blue" in (out / "report.html").read_text()
