"""A command line in front of services without models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from servers.fake_services import World, serving


class Cli:
    """Runs `toile` in this process."""

    def __init__(self) -> None:
        self._runner = CliRunner()

    def __call__(self, *arguments: object) -> Result:
        from toile.cli.main import app

        return self._runner.invoke(app, [str(a) for a in arguments], catch_exceptions=True)

    def json(self, *arguments: object) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`toile` with a home of its own and nothing running."""
    monkeypatch.setenv("TOILE_HOME", str(tmp_path / "home"))
    for service in ("DATASET", "TRAIN", "GENERATE", "RANK", "REFINE"):
        monkeypatch.delenv(f"TOILE_{service}_ADDRESS", raising=False)
    return Cli()


@pytest.fixture
def world(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Services that `cli` talks to."""
    world = World()
    with serving(world) as address:
        for service in ("DATASET", "TRAIN", "GENERATE", "RANK", "REFINE"):
            monkeypatch.setenv(f"TOILE_{service}_ADDRESS", address)
        yield world


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of six photographs, one of them with a caption."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (80, 60), (40 * number, 120, 90)).save(folder / f"{number}.jpg")
    (folder / "0.txt").write_text("ivory lace\n over burgundy", encoding="utf-8")
    (folder / "notes.md").write_text("not a photograph", encoding="utf-8")
    return folder
