"""Alembic, driven from code: the migrations are part of the package."""

from functools import cache

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from toile.core.errors import FailedPreconditionError


def upgrade(connection: Connection) -> None:
    """Upgrade to the newest revision, inside the connection's transaction.

    Raises:
        FailedPreconditionError: The database is at a revision that this version lacks.
    """
    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise FailedPreconditionError(
            f"the catalog cannot be migrated by this version: {error}",
            reason="CATALOG_NOT_MIGRATED",
        ) from error


def current_revision(connection: Connection) -> str | None:
    """Return the revision that the database is at; None before the first migration."""
    revision: str | None = MigrationContext.configure(connection).get_current_revision()
    return revision


@cache
def head_revision() -> str | None:
    """Return the newest revision of this version."""
    revision: str | None = ScriptDirectory.from_config(_config()).get_current_head()
    return revision


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "toile.core.catalog:migrations")
    config.set_main_option("path_separator", "os")
    return config
