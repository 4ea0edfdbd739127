import json
import shutil
from pathlib import Path

import pytest

from toile.cli.platform import prepare as module
from toile.core.bases import resolve_base
from toile.core.catalog import open_catalog
from toile.core.catalog.models import GenerationRow
from toile.core.errors import AlreadyExistsError
from toile.core.settings import Settings


@pytest.fixture
def newer(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The bundle of a later release."""
    folder = tmp_path / "newer"
    shutil.copytree(tiny_bundle, folder)
    description = json.loads((folder / "toile.json").read_text(encoding="utf-8"))
    (folder / "toile.json").write_text(json.dumps({**description, "release": 2}))
    return folder


def test_a_newer_shipped_base_leaves_a_home_with_work_in_it_alone(
    tiny_bundle: Path,
    newer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings(home=tmp_path / "home")
    monkeypatch.setattr(module, "_bundle", lambda settings: settings.base_path or tiny_bundle)
    module.prepare(settings)
    catalog = open_catalog(settings)
    with catalog.transaction() as session:
        first = resolve_base(session, settings.default_base).digest
        session.add(
            GenerationRow(
                name="projects/p/generations/g",
                project="p",
                request={},
                base=settings.default_base,
                state="SUCCEEDED",
            )
        )

    monkeypatch.setattr(module, "_bundle", lambda settings: settings.base_path or newer)
    module.prepare(settings)
    assert "it is kept" in capsys.readouterr().err
    module.prepare(settings.model_copy(update={"default_base": "bases/newer"}))
    with catalog.reading() as session:
        assert resolve_base(session, settings.default_base).digest == first
        assert resolve_base(session, "bases/newer").digest != first
    catalog.close()

    with pytest.raises(AlreadyExistsError, match="TOILE_DEFAULT_BASE"):
        module.prepare(settings.model_copy(update={"base_path": newer}))
