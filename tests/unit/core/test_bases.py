import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toile.core.artifacts import fetch, open_store, read_manifest
from toile.core.bases import bundle_digest, import_base, list_bases, resolve_base
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import GenerationRow
from toile.core.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from toile.core.settings import Settings

UNET = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def catalog(settings: Settings) -> Catalog:
    catalog = open_catalog(settings)
    catalog.migrate()
    return catalog


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    def make(folder: str = "bundle", **description: object) -> Path:
        path = tmp_path / folder
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            (path / part).mkdir(parents=True, exist_ok=True)
            (path / part / "config.json").write_text("{}")
        (path / "unet/config.json").write_text(json.dumps(UNET))
        (path / "model_index.json").write_text("{}")
        facts = {"native_size": 128, "licence": "CC0-1.0", **description}
        (path / "toile.json").write_text(json.dumps(facts))
        return path

    return make


def test_a_base_is_published_whole_and_found(
    settings: Settings, catalog: Catalog, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    store = open_store(settings)
    row = import_base(settings, catalog, store, bundle())

    assert row.name == settings.default_base
    assert (row.native_size, row.license) == (128, "CC0-1.0")
    assert row.artifact == f"bases/tiny/{row.digest[:12]}"
    assert read_manifest(store, row.artifact).digest == row.digest == bundle_digest(bundle())
    assert (fetch(store, row.artifact, tmp_path / "cache") / "unet/config.json").is_file()
    with catalog.reading() as session:
        assert resolve_base(session, row.name).artifact == row.artifact
        assert [base.name for base in list_bases(session)] == [row.name]
        with pytest.raises(NotFoundError):
            resolve_base(session, "bases/none")
        with pytest.raises(InvalidArgumentError):
            resolve_base(session, "none")


def test_importing_again_changes_nothing(
    settings: Settings, catalog: Catalog, bundle: Callable[..., Path]
) -> None:
    store = open_store(settings)
    first = import_base(settings, catalog, store, bundle())
    again = import_base(settings, catalog, store, bundle("copy"))
    assert (again.artifact, again.digest) == (first.artifact, first.digest)


def test_a_base_is_replaced_only_while_nothing_depends_on_it(
    settings: Settings, catalog: Catalog, bundle: Callable[..., Path]
) -> None:
    store = open_store(settings)
    first = import_base(settings, catalog, store, bundle())
    second = import_base(settings, catalog, store, bundle("better", native_size=256))
    assert second.digest != first.digest
    with catalog.transaction() as session:
        session.add(
            GenerationRow(
                name="projects/p/generations/g",
                project="p",
                request={},
                base=second.name,
                state="SUCCEEDED",
            )
        )
    with pytest.raises(AlreadyExistsError) as caught:
        import_base(settings, catalog, store, bundle("best", native_size=512))
    assert caught.value.reason == "BASE_CHANGED"
    with catalog.reading() as session:
        assert resolve_base(session, second.name).digest == second.digest
    best = import_base(settings, catalog, store, bundle("best"), "bases/best")
    assert best.artifact.startswith("bases/best/")


def rewrite(path: Path, **unet: object) -> None:
    (path / "unet/config.json").write_text(json.dumps({**UNET, **unet}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "toile.json").unlink(), "toile.json"),
        (lambda path: (path / "vae/config.json").unlink(), "vae"),
        (lambda path: (path / "text_encoder_2/config.json").unlink(), "text_encoder_2"),
        (lambda path: rewrite(path, addition_embed_type="text"), "addition_embed_type"),
        (lambda path: rewrite(path, _class_name="UNet2DModel"), "UNet2DModel"),
        (lambda path: rewrite(path, in_channels=9), "in_channels"),
        (lambda path: (path / "unet/config.json").write_text("["), "no configuration"),
        (lambda path: (path / "toile.json").write_text("{"), "not JSON"),
        (lambda path: (path / "toile.json").write_text("[]"), "native_size"),
        (lambda path: (path / "toile.json").write_text('{"native_size": 100}'), "native_size"),
        (lambda path: (path / "unet/weights.bin").write_bytes(b""), "pickle"),
    ],
)
def test_what_is_no_bundle_is_refused(
    settings: Settings,
    catalog: Catalog,
    bundle: Callable[..., Path],
    spoil: Callable[[Path], object],
    says: str,
) -> None:
    path = bundle()
    spoil(path)
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        import_base(settings, catalog, open_store(settings), path)
    assert caught.value.reason == "BAD_BASE"
    with catalog.reading() as session:
        assert not list_bases(session)
