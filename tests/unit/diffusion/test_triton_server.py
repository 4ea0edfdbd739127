"""Paths that Triton's Python backend can put into a command line."""

import tempfile
from pathlib import Path

import pytest

from toile.core.errors import FailedPreconditionError
from toile.diffusion.triton.server import plainly_named


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_plain_path_is_left_alone(tmp_path: Path, links: Path) -> None:
    assert plainly_named(tmp_path) == tmp_path.resolve()
    assert list(links.iterdir()) == []


@pytest.mark.parametrize("name", ["my models", "$HOME", "a'b", "entwürfe; rm -rf"])
def test_another_is_reached_by_a_link(tmp_path: Path, links: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    found = plainly_named(folder)
    assert found.samefile(folder)
    assert found.parent == links
    assert plainly_named(folder) == found
    found.unlink()
    found.symlink_to(links)  # of somebody else, or stale
    assert plainly_named(folder).samefile(folder)


def test_where_no_link_can_be_made_it_is_said(tmp_path: Path, links: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    found = plainly_named(folder)
    found.unlink()
    found.mkdir()
    with pytest.raises(FailedPreconditionError, match="my models") as caught:
        plainly_named(folder)
    assert caught.value.reason == "NO_LINK"
    assert links.is_dir()
