"""The catalog keeps its promises on SQLite and on a real PostgreSQL."""

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.exc import IntegrityError

from toile.core.catalog import Catalog, open_catalog
from toile.core.catalog.models import (
    DatasetRow,
    JobRow,
    PhotographRow,
    RequestRow,
    Table,
)
from toile.core.catalog.paging import page
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.errors import (
    CatalogUnavailableError,
    DataLossError,
    DiskFullError,
    FailedPreconditionError,
    InvalidArgumentError,
    RequestReusedError,
    UnavailableError,
)
from toile.core.settings import Settings
from toile.v1 import dataset_pb2


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'catalog.db'}"
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(url)) as catalog:
        catalog.migrate()
        yield catalog


def dataset(name: str, project: str = "p") -> DatasetRow:
    return DatasetRow(
        name=f"projects/{project}/datasets/{name}", project=project, trigger_word="<x>"
    )


def names(catalog: Catalog) -> list[str]:
    with catalog.reading() as session:
        return list(session.scalars(select(DatasetRow.name).order_by(DatasetRow.name)))


# Migrations


def test_the_migrations_make_what_the_models_say(catalog: Catalog, url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        indexes = inspect(connection).get_indexes("images")
    engine.dispose()
    assert "ix_images_producer_order" in {index["name"] for index in indexes}


def test_migrating_again_changes_nothing(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.add(dataset("d"))
    catalog.migrate()
    catalog.check()
    assert names(catalog) == ["projects/p/datasets/d"]


def test_an_old_catalog_is_not_ready(url: str) -> None:
    with contextlib.closing(Catalog(url)) as catalog:
        if url.startswith("sqlite"):
            with pytest.raises(CatalogUnavailableError):
                catalog.check()  # not even a file
            Path(catalog._engine.url.database or "").parent.mkdir()
        with pytest.raises(FailedPreconditionError) as caught:
            catalog.check()
        assert caught.value.reason == "CATALOG_NOT_MIGRATED"
        catalog.migrate()
        catalog.check()


def test_a_newer_catalog_is_left_alone(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (catalog.check, catalog.migrate):
        with pytest.raises(FailedPreconditionError) as caught:
            use()
        assert caught.value.reason == "CATALOG_NOT_MIGRATED"
    with catalog.reading() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


MIGRATE = """
import sys
from toile.core.catalog import Catalog, migration
migration.head_revision()
print("waiting", flush=True)
sys.stdin.readline()
catalog = Catalog(sys.argv[1])
catalog.migrate()
catalog.check()
"""


def test_processes_that_start_together_migrate_once(url: str) -> None:
    command = [sys.executable, "-c", MIGRATE, url]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"waiting\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 4


# Transactions


def test_what_is_written_is_read(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        row = dataset("d")
        session.add(row)
    assert row.name == "projects/p/datasets/d"  # usable after the transaction
    with catalog.reading() as session:
        again = session.get(DatasetRow, row.name)
        assert again is not None
        assert again.create_time.tzinfo is not None
        assert abs(again.create_time - datetime.now(UTC)) < timedelta(minutes=1)


def test_an_error_takes_everything_back(catalog: Catalog) -> None:
    def work() -> None:
        with catalog.transaction() as session:
            session.add(dataset("a"))
            session.flush()
            session.add(dataset("b"))
            raise KeyError("no")

    with pytest.raises(KeyError):
        work()
    assert names(catalog) == []


def test_a_reader_changes_nothing(catalog: Catalog) -> None:
    with catalog.reading() as session:
        session.add(dataset("a"))
        session.flush()
    assert names(catalog) == []


def test_references_are_checked(catalog: Catalog) -> None:
    photograph = PhotographRow(
        dataset="projects/p/datasets/none",
        digest="0",
        sequence=1,
        file_name="f",
        media_type="image/png",
        width=1,
        height=1,
        artifact="a",
    )
    with pytest.raises(IntegrityError), catalog.transaction() as session:
        session.add(photograph)


def test_json_and_empty_values_come_back(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.add(
            JobRow(
                name="projects/p/jobs/j",
                project="p",
                kind="TRAINING",
                state="QUEUED",
                target="t",
                spec={"steps": 3, "nested": {"ä": [1, None]}},
                progress={},
            )
        )
    with catalog.reading() as session:
        job = session.get_one(JobRow, "projects/p/jobs/j")
    assert job.spec == {"steps": 3, "nested": {"ä": [1, None]}}
    assert job.heartbeat_time is None
    assert job.cancel_requested is False


def test_writers_wait_for_one_another(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.add(dataset("counter"))

    def add_one() -> None:
        for _ in range(5):
            with catalog.transaction() as session:
                row = session.get_one(
                    DatasetRow, "projects/p/datasets/counter", with_for_update=True
                )
                row.license += "x"

    threads = [threading.Thread(target=add_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.reading() as session:
        assert session.get_one(DatasetRow, "projects/p/datasets/counter").license == "x" * 40


def test_readers_do_not_wait_for_a_writer(catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.add(dataset("a"))
        session.flush()
        start = time.monotonic()
        assert names(catalog) == []
        assert time.monotonic() - start < 5


# When the database is away


def test_a_database_that_is_away_is_unavailable(tmp_path: Path) -> None:
    for url in (
        "postgresql://127.0.0.1:1/toile",
        f"sqlite:///{tmp_path / 'none' / 'catalog.db'}",
    ):
        with contextlib.closing(Catalog(url)) as catalog:
            with pytest.raises(CatalogUnavailableError):
                catalog.check()
            with pytest.raises(CatalogUnavailableError), catalog.transaction() as session:
                session.add(dataset("d"))


def test_lost_connections_are_replaced(postgres_database: str) -> None:
    with contextlib.closing(Catalog(postgres_database)) as catalog:
        catalog.migrate()
        with pytest.raises(CatalogUnavailableError), catalog.transaction() as session:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        catalog.check()


def test_a_full_disk_has_its_own_error_and_loses_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'catalog.db'}"
    with contextlib.closing(Catalog(url)) as catalog:
        catalog.migrate()
        with catalog.transaction() as session:
            session.add(dataset("kept"))

        def fill() -> None:
            with catalog.transaction() as session:
                pages = session.scalar(text("PRAGMA page_count"))
                session.execute(text(f"PRAGMA max_page_count = {pages}"))
                for i in range(2000):
                    session.add(dataset(f"d{i}"))
                    session.flush()

        with pytest.raises(DiskFullError):
            fill()
        assert names(catalog) == ["projects/p/datasets/kept"]


def test_a_damaged_file_is_data_loss(tmp_path: Path) -> None:
    file = tmp_path / "catalog.db"
    file.write_bytes(b"not a database " * 1000)
    with contextlib.closing(Catalog(f"sqlite:///{file}")) as catalog, pytest.raises(DataLossError):
        catalog.check()


def test_sqlite_is_set_up_for_many_processes(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with contextlib.closing(open_catalog(settings)) as catalog:
        catalog.migrate()
        with catalog.reading() as session:
            values = [
                session.scalar(text(f"PRAGMA {name}"))
                for name in ("journal_mode", "busy_timeout", "foreign_keys", "synchronous")
            ]
    assert values == ["wal", 30_000, 1, 1]
    plain = sqlite3.connect(tmp_path / "catalog.db")
    assert plain.execute("SELECT count(*) FROM datasets").fetchone() == (0,)
    plain.close()


# Requests sent twice


def create(catalog: Catalog, request: dataset_pb2.CreateDatasetRequest) -> str:
    """What a handler does with a request id."""
    digest = request_digest(request)
    key = {"scope": "CreateDataset p", "request_id": request.request_id, "digest": digest}
    with catalog.transaction() as session:
        if found := recall(session, **key):
            return found
        row = dataset(f"d{time.monotonic_ns()}")
        session.add(row)
        remember(session, **key, resource=row.name)
        return row.name


def request(**fields: str) -> dataset_pb2.CreateDatasetRequest:
    return dataset_pb2.CreateDatasetRequest(parent="projects/p", **fields)  # type: ignore[arg-type]


def test_a_request_sent_again_gets_the_first_answer(catalog: Catalog) -> None:
    first = create(catalog, request(request_id="r", dataset_id="a"))
    assert create(catalog, request(request_id="r", dataset_id="a")) == first
    assert create(catalog, request(request_id="s", dataset_id="a")) != first
    assert len(names(catalog)) == 2


def test_an_id_with_other_content_is_refused(catalog: Catalog) -> None:
    create(catalog, request(request_id="r", dataset_id="a"))
    with pytest.raises(RequestReusedError):
        create(catalog, request(request_id="r", dataset_id="b"))
    assert len(names(catalog)) == 1


def test_without_an_id_every_request_counts(catalog: Catalog) -> None:
    assert create(catalog, request()) != create(catalog, request())


def test_equal_requests_at_the_same_time_make_one(catalog: Catalog) -> None:
    answers: list[str] = []
    barrier = threading.Barrier(6)

    def send() -> None:
        barrier.wait()
        answers.append(create(catalog, request(request_id="r")))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert len(set(answers)) == 1
    assert names(catalog) == answers[:1]


def test_a_request_that_was_not_recalled_first_cannot_be_remembered_twice(
    catalog: Catalog,
) -> None:
    key = {"scope": "s", "request_id": "r", "digest": "d"}
    with catalog.transaction() as session:
        remember(session, **key, resource="first")
    with pytest.raises(UnavailableError) as caught, catalog.transaction() as session:
        remember(session, **key, resource="second")
    assert caught.value.reason == "REQUEST_IN_PROGRESS"
    with pytest.raises(RequestReusedError), catalog.transaction() as session:
        remember(session, **{**key, "digest": "other"}, resource="second")
    with catalog.reading() as session:
        assert session.get_one(RequestRow, ("s", "r")).resource == "first"


def test_a_failed_request_can_be_sent_again(catalog: Catalog) -> None:
    def fail() -> None:
        with catalog.transaction() as session:
            remember(session, scope="s", request_id="r", digest="d", resource="lost")
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    with catalog.transaction() as session:
        assert recall(session, scope="s", request_id="r", digest="d") is None


def test_a_long_id_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        create(catalog, request(request_id="r" * 129))
    assert caught.value.metadata == {"field": "request_id"}


def test_a_digest_does_not_depend_on_the_id() -> None:
    assert request_digest(request(request_id="a")) == request_digest(request(request_id="b"))
    assert request_digest(request(dataset_id="a")) != request_digest(request(dataset_id="b"))
    other = dataset_pb2.ListDatasetsRequest(parent="projects/p")
    assert request_digest(other) != request_digest(request())


# Pages


def listing(
    catalog: Catalog, *, size: int = 3, token: str = "", descending: bool = False
) -> tuple[list[str], str]:
    with catalog.reading() as session:
        rows, following = page(
            session,
            select(DatasetRow).where(DatasetRow.project == "p"),
            [DatasetRow.name],
            page_size=size,
            page_token=token,
            scope="ListDatasets projects/p",
            descending=descending,
        )
    return [row.name.rsplit("/", 1)[1] for row in rows], following


def fill(catalog: Catalog, *ids: str) -> None:
    with catalog.transaction() as session:
        session.add_all([dataset(i) for i in ids] + [dataset("x", project="other")])


@pytest.mark.parametrize("descending", [False, True])
def test_pages_hold_every_row_once_in_order(catalog: Catalog, descending: bool) -> None:
    ids = [f"d{i}" for i in range(8)]
    fill(catalog, *ids)
    seen: list[str] = []
    token = ""
    sizes = []
    while True:
        rows, token = listing(catalog, token=token, descending=descending)
        seen += rows
        sizes.append(len(rows))
        if not token:
            break
    assert seen == sorted(ids, reverse=descending)
    assert sizes == [3, 3, 2]


def test_the_last_page_has_no_token_even_when_full(catalog: Catalog) -> None:
    fill(catalog, "a", "b", "c")
    assert listing(catalog) == (["a", "b", "c"], "")


def test_rows_that_come_and_go_do_not_shift_pages(catalog: Catalog) -> None:
    fill(catalog, "b", "c", "d", "e")
    rows, token = listing(catalog, size=2)
    with catalog.transaction() as session:
        session.delete(session.get_one(DatasetRow, "projects/p/datasets/c"))
        session.add(dataset("a"))
    assert rows == ["b", "c"]
    assert listing(catalog, size=2, token=token) == (["d", "e"], "")


def test_page_sizes(catalog: Catalog) -> None:
    fill(catalog, *(f"d{i:04}" for i in range(1001)))
    assert len(listing(catalog, size=0)[0]) == 50
    assert len(listing(catalog, size=5000)[0]) == 1000
    with pytest.raises(InvalidArgumentError):
        listing(catalog, size=-1)


def test_times_order_pages_too(catalog: Catalog) -> None:
    start = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
    with catalog.transaction() as session:
        for i in range(5):
            row = dataset(f"d{9 - i}")
            row.create_time = start + timedelta(microseconds=i // 2)
            session.add(row)
    seen: list[str] = []
    token = ""
    while True:
        with catalog.reading() as session:
            rows, token = page(
                session,
                select(DatasetRow),
                [DatasetRow.create_time, DatasetRow.name],
                page_size=1,
                page_token=token,
                scope="s",
                descending=True,
            )
        seen += [row.name[-2:] for row in rows]
        if not token:
            break
    assert seen == ["d5", "d7", "d6", "d9", "d8"]


@pytest.mark.parametrize(
    "bad",
    [
        lambda token: "nonsense",
        lambda token: "é",
        lambda token: token[:-3],
        lambda token: token + "AAAA",
        lambda token: "W10",  # []
        lambda token: "bnVsbA",  # null
        lambda token: "WzEsMl0",  # [1,2]
    ],
)
def test_a_wrong_token_is_refused(catalog: Catalog, bad: Callable[[str], str]) -> None:
    fill(catalog, "a", "b", "c", "d")
    _, token = listing(catalog)
    with pytest.raises(InvalidArgumentError) as caught:
        listing(catalog, token=bad(token))
    assert caught.value.reason == "BAD_PAGE_TOKEN"
    assert caught.value.metadata == {"field": "page_token"}


def test_a_token_of_another_list_is_refused(catalog: Catalog) -> None:
    fill(catalog, "a", "b", "c", "d")
    _, token = listing(catalog)
    with pytest.raises(InvalidArgumentError), catalog.reading() as session:
        page(
            session,
            select(DatasetRow),
            [DatasetRow.name],
            page_size=3,
            page_token=token,
            scope="ListDatasets projects/other",
        )
