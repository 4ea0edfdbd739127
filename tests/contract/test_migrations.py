"""Catalogs of earlier versions keep what is in them."""

import contextlib
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, create_engine, event, text

from toile.core.catalog import Catalog, migration
from toile.core.catalog.models import GenerationAdapterRow, ModelRow, ModelVersionRow
from toile.core.jobs import JobKind, JobStore

VERSION = "projects/p/models/m/versions/1"
OLD = """
INSERT INTO bases (name, artifact, digest, native_size, license, create_time)
    VALUES ('bases/b', 'a', 'd', 128, '', '2026-01-01');
INSERT INTO datasets (name, project, trigger_word, license, create_time)
    VALUES ('projects/p/datasets/d', 'p', '<x>', '', '2026-01-01');
INSERT INTO dataset_versions (name, dataset, number, digest, artifact, trigger_word, resolution,
                              image_count, rejected, job, create_time)
    VALUES ('v', 'projects/p/datasets/d', 1, 'd', 'a', '<x>', 64, 1, '[]', 'j', '2026-01-01');
INSERT INTO models (name, project, create_time) VALUES ('projects/p/models/m', 'p', '2026-01-01');
INSERT INTO model_versions (name, model, number, adapter_type, artifact, digest, base,
                            dataset_version, dataset_digest, trigger_word, config, final_loss,
                            reproduction_difference, code_version, files, job, create_time)
    VALUES ('projects/p/models/m/versions/1', 'projects/p/models/m', 1, 'lora', 'a', 'd', 'bases/b',
            'v', 'd', '<x>', '{"rank": 4}', 0.5, 0, '1', '[]', 'j', '2026-01-01');
INSERT INTO producer_adapters (producer, model_version, weight)
    VALUES ('g', 'projects/p/models/m/versions/1', 0.5)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.db'}"
    return str(request.getfixturevalue("postgres_database"))


def go_to(connection: Connection, revision: str) -> None:
    config = migration._config()
    config.attributes["connection"] = connection
    current = migration.current_revision(connection)
    (command.upgrade if current is None else command.downgrade)(config, revision)


def test_versions_in_use_survive_the_registry_and_its_way_back(url: str) -> None:
    engine = create_engine(url)
    if url.startswith("sqlite"):  # as the catalog's own connections
        event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA foreign_keys=ON"))
    with engine.begin() as connection:
        go_to(connection, "0002")
        for statement in OLD.split(";"):
            connection.execute(text(statement.replace(":", r"\:")))
    with contextlib.closing(Catalog(url)) as catalog:
        catalog.migrate()
        catalog.check()
        with catalog.reading() as session:
            row = session.get_one(ModelVersionRow, VERSION)
            assert (row.dataset_version, row.config, row.number) == ("v", {"rank": 4}, 1)
            assert (row.imported_digest, row.deprecate_time) == ("", None)
            assert session.get_one(ModelRow, row.model).retired_number == 0
            assert session.get_one(GenerationAdapterRow, ("g", VERSION)).weight == 0.5
    with engine.begin() as connection:
        go_to(connection, "0002")
        used = connection.execute(text("SELECT model_version, weight FROM producer_adapters"))
        assert used.all() == [(VERSION, 0.5)]
    engine.dispose()


def test_paused_jobs_are_cancelled_where_they_are_not_known(url: str) -> None:
    engine = create_engine(url)
    with contextlib.closing(Catalog(url)) as catalog:
        catalog.migrate()
        jobs = JobStore(catalog)
        with catalog.transaction() as session:
            name = jobs.create(
                session, project="p", kind=JobKind.TRAINING, target="t", spec={}
            ).name
        jobs.request_pause(name)
        with engine.begin() as connection:
            go_to(connection, "0003")
        catalog.migrate()
        row = jobs.get(name)
        assert (row.state, row.attempt, row.pause_requested) == ("CANCELLED", 0, False)
        assert row.end_time is not None
    engine.dispose()
