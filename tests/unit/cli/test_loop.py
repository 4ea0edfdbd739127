"""Whole loops against services without models: results, and going on after an interruption."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from servers.fake_services import World, press_ctrl_c
from toile.cli.loop.state import STATE_FILE


@pytest.fixture
def loop(tmp_path: Path, photographs: Path) -> Path:
    """A loop file of two prompts with three designs each."""
    path = tmp_path / "loop.yaml"
    content = {
        "title": "Lace in six photographs",
        "out": "out",
        "dataset": {"name": "lace", "folder": photographs.name, "trigger": "<lace>"},
        "train": {"model": "lace", "steps": 10},
        "generate": {
            "prompts": ["<lace>, a white dress", "<lace>, a black top"],
            "count": 3,
            "seed": 5,
            "refiner": {"strength": 0.2},
        },
        "rank": {"keep": 2},
        "refine": {"instruction": "make it blue"},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_loop_leaves_everything_that_a_person_wants_to_see(
    cli, world: World, loop: Path, tmp_path: Path
) -> None:
    figures = cli.json("run", loop)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert [design["rank"] for design in summary["designs"]] == [1, 2, 3, 4, 5, 6]
    assert sorted(design["seed"] for design in summary["designs"]) == [5, 6, 7, 8, 9, 10]
    assert len(list((out / "images").glob("*.png"))) == 7
    assert [path.name[0] for path in sorted((out / "best").iterdir())] == ["1", "2"]
    for name in ("contact-sheet.png", "loss.png", "refinement.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    assert [step["name"] for step in figures["steps"]] == [
        *("import", "build", "train", "generate-1", "generate-2", "rank", "refine", "report")
    ]
    assert figures["total_seconds"] > 0

    page = (out / "report.html").read_text()
    for text in ("Lace in six photographs", "make it blue", "&lt;lace&gt;, a white dress"):
        assert text in page
    assert "ivory lace over burgundy" in page
    assert 'src="http' not in page  # everything is in the page
    assert page.count('class="lineage"') == 3
    stages = [g.request.refiner.strength for g in world.generations.values()]
    assert stages == [0.2, 0.2]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("WatchJob-build", {"import"}),
        ("WatchJob-train", {"import", "build"}),
        ("Generate", {"import", "build", "train"}),
    ],
)
def test_an_interrupted_loop_cancels_its_work_and_goes_on_from_the_last_finished_step(
    cli, world: World, loop: Path, tmp_path: Path, where: str, kept: set[str]
) -> None:
    world.during[where] = press_ctrl_c
    stopped = cli("run", loop)
    assert stopped.exit_code == 130
    assert "goes on from there" in stopped.stderr
    state = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert set(state["steps"]) == kept
    if where.startswith("WatchJob"):
        assert world.calls["CancelJob"] == 1

    world.during.clear()
    figures = cli.json("run", loop)
    assert figures["taken_up"] is True
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(world.versions) == 1
    assert world.calls["ImportImages"] == 1
    assert len(world.models) == 1


def test_a_failed_step_is_tried_again_with_a_request_of_its_own(
    cli, world: World, loop: Path
) -> None:
    from toile.core.errors import DiskFullError

    def full() -> None:
        raise DiskFullError("the disk is full")

    world.before["RankImages"] = full
    failed = cli("run", loop)
    assert failed.exit_code == 1
    assert "the disk is full" in failed.stderr
    world.before.clear()
    assert cli("run", loop).exit_code == 0
    assert world.calls["Generate"] == 2


def test_a_finished_loop_runs_anew_and_a_changed_one_from_where_it_changed(
    cli, world: World, loop: Path, tmp_path: Path
) -> None:
    assert cli("run", loop).exit_code == 0
    loop.write_text(loop.read_text().replace("make it blue", "make it red"))
    assert cli("run", loop).exit_code == 0
    assert world.calls["CreateTrainingJob"] == 1
    assert world.calls["RefineImage"] == 2
    assert cli("run", loop).exit_code == 0
    assert world.calls["CreateTrainingJob"] == 2
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 7


def test_a_loop_whose_platform_forgot_everything_begins_anew(cli, world: World, loop: Path) -> None:
    world.during["Generate"] = press_ctrl_c
    assert cli("run", loop).exit_code == 130
    world.during.clear()
    world.datasets.clear()
    world.photographs.clear()
    world.requests.clear()
    again = cli("run", loop)
    assert again.exit_code == 0, again.stderr
    assert "starting anew" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 10", "steps: ten"), "loop.yaml:9: train.steps: "),
        (("  model: lace", "  modell: lace"), "train.modell: there is no such field"),
        (("instruction: make it blue", "strength: 0.5"), "refine.instruction: is missing"),
        (("name: lace", "name: Lace"), "loop.yaml:4: dataset.name: must be"),
        (("title: ", "title: ["), "is not YAML"),
        (("count: 3", "count: 65"), "generate.count"),
        (
            ("  count: 3", "  steps: 2\n  count: 3"),
            "generate.refiner: 2 steps leave none",
        ),
    ],
)
def test_what_is_wrong_in_a_loop_file_is_named_with_its_line(
    cli, loop: Path, change: tuple[str, str], message: str
) -> None:
    loop.write_text(loop.read_text().replace(*change))
    result = cli("run", loop)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_loop_over_an_empty_folder_starts_nothing(cli, loop: Path, photographs: Path) -> None:
    for path in photographs.iterdir():
        path.unlink()
    result = cli("run", loop)
    assert result.exit_code == 1
    assert "no image files are in" in result.stderr


def test_a_loop_file_that_is_not_there(cli, tmp_path: Path) -> None:
    result = cli("run", tmp_path / "none.yaml")
    assert result.exit_code == 1
    assert "there is no loop file" in result.stderr
