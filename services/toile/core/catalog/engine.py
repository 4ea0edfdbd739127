"""The connection to the catalog: SQLite on one machine, PostgreSQL in a cluster."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url, text
from sqlalchemy.orm import Session

from toile.core.errors import (
    AlreadyExistsError,
    CatalogUnavailableError,
    DataLossError,
    DiskFullError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ToileError,
)
from toile.core.settings import Settings

BUSY_TIMEOUT_SECONDS = 30
CONNECT_TIMEOUT_SECONDS = 5
_BEGIN = "toile_begin"  # execution option: how SQLite begins the transaction
_MIGRATION_LOCK = 0x746F696C65  # "toile"; key of PostgreSQL's advisory lock


class Catalog:
    """All tables, in one database. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        self._engine = _make_engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"

    def migrate(self) -> None:
        """Bring the tables up to date; several processes may do so at the same time.

        Raises:
            CatalogUnavailableError: The database does not answer.
            FailedPreconditionError: The database was written by a newer version.
        """
        from toile.core.catalog import migration  # late: only who migrates needs Alembic

        if self._is_sqlite and (path := self._engine.url.database):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _translated(), self._beginning("EXCLUSIVE").begin() as connection:
            if not self._is_sqlite:
                lock = text("SELECT pg_advisory_xact_lock(:key)")
                connection.execute(lock, {"key": _MIGRATION_LOCK})
            migration.upgrade(connection)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session that writes: committed at the end, rolled back on any error.

        Writers wait for one another on SQLite, so keep it short. Rows stay usable after it.

        Raises:
            CatalogUnavailableError: The database does not answer.
            DiskFullError: The database has no space left.
        """
        engine = self._beginning("IMMEDIATE")
        with _translated(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a session that only reads, and waits for no writer. What it changes is lost.

        Raises:
            CatalogUnavailableError: The database does not answer.
        """
        engine = self._beginning("DEFERRED")
        with _translated(), Session(engine, expire_on_commit=False) as session:
            yield session

    def check(self) -> None:
        """Make sure that the database answers and has this version's tables.

        Raises:
            CatalogUnavailableError: It does not answer.
            FailedPreconditionError: Its tables are of another version.
        """
        from toile.core.catalog import migration

        with _translated(), self._beginning("DEFERRED").connect() as connection:
            have, want = migration.current_revision(connection), migration.head_revision()
        if have != want:
            raise FailedPreconditionError(
                f"the catalog's tables are at revision {have or 'none'}, not {want}",
                reason="CATALOG_NOT_MIGRATED",
            )

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _beginning(self, how: str) -> Engine:
        return self._engine.execution_options(**{_BEGIN: how})


def open_catalog(settings: Settings) -> Catalog:
    """Open the catalog that the settings name."""
    return Catalog(settings.resolved_catalog_url)


def translate(error: BaseException) -> ToileError | None:
    """Return what a database error means for callers; None if it is a bug of ours."""
    if isinstance(error, exc.TimeoutError | exc.DisconnectionError):
        return CatalogUnavailableError("the catalog has no connection free")
    if isinstance(error, exc.NoResultFound):
        return NotFoundError("the catalog has no such row")
    if not isinstance(error, exc.DBAPIError):
        return None
    state = _state(error.orig)
    if state in _MEANINGS:
        kind, message = _MEANINGS[state]
        return kind(message)
    if isinstance(error, exc.DataError):
        return InvalidArgumentError("a value does not fit into the catalog")
    if error.connection_invalidated or isinstance(
        error, exc.OperationalError | exc.InterfaceError | exc.InternalError
    ):
        wrong_sql = state == sqlite3.SQLITE_ERROR  # such as an unknown table
        return None if wrong_sql else CatalogUnavailableError("the catalog does not answer")
    return None


_DISK_FULL = (DiskFullError, "no space is left for the catalog")
_EXISTS = (AlreadyExistsError, "it exists already")
_DAMAGED = (DataLossError, "the catalog's file is damaged")
_REFERENCE = (FailedPreconditionError, "something that this refers to is not in the catalog")
# SQLite's extended result codes, and PostgreSQL's SQLSTATEs.
_MEANINGS: dict[int | str | None, tuple[type[ToileError], str]] = {
    sqlite3.SQLITE_FULL: _DISK_FULL,
    "53100": _DISK_FULL,
    sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY: _EXISTS,
    sqlite3.SQLITE_CONSTRAINT_UNIQUE: _EXISTS,
    "23505": _EXISTS,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: _REFERENCE,
    "23503": _REFERENCE,
}


def _state(original: BaseException | None) -> int | str | None:
    if isinstance(original, sqlite3.Error):
        return getattr(original, "sqlite_errorcode", None)
    return getattr(original, "sqlstate", None)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (exc.IntegrityError, exc.NoResultFound):
        raise  # who wrote the statement may know better what it means
    except exc.SQLAlchemyError as error:
        known = translate(error)
        if known is None:
            raise
        raise known from error


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _make_sqlite(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_engine(
        parsed,
        pool_pre_ping=True,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS},
    )


def _make_sqlite(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})

    @event.listens_for(engine, "connect")
    def _(connection: sqlite3.Connection, record: Any) -> None:  # noqa: ARG001
        connection.isolation_level = None  # the driver must not begin by itself
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        begin = connection.get_execution_options().get(_BEGIN, "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {begin}")

    return engine
