"""A real PostgreSQL from the `pgserver` wheel, reachable through a Unix socket only."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """Start a PostgreSQL and yield the SQLAlchemy URL of its `postgres` database.

    Run by root it serves as a system user of its own, for PostgreSQL refuses to be root.
    """
    import pgserver

    # Not under pytest's folder: a socket's path has room for about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="toile-pg-"))
    try:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fresh_database(server_url: str, name: str) -> Iterator[str]:
    """Create an empty database for one test, yield its URL, and drop it."""
    import psycopg
    from sqlalchemy import make_url

    url = make_url(server_url)
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())
