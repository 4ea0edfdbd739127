"""`python -m toile.cli.platform.prepare`: make the catalog and take in the base, then end."""

import sys
from importlib import resources
from pathlib import Path

from toile.core.artifacts import open_store
from toile.core.bases import import_base
from toile.core.catalog import open_catalog
from toile.core.errors import AlreadyExistsError, NotFoundError, ToileError
from toile.core.settings import Settings


def main() -> int:
    """Return 0 when catalog, store and base are there."""
    settings = Settings()
    try:
        prepare(settings)
    except ToileError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def prepare(settings: Settings) -> None:
    """Migrate the catalog and import the base that the settings name.

    A release may ship a newer tiny base. A home in which the earlier one was worked with keeps it.

    Raises:
        CatalogUnavailableError: The database does not answer.
        StoreUnavailableError: The object store does not answer.
        NotFoundError: There is no base to import.
        AlreadyExistsError: The settings name a bundle, and its name is in use for another.
    """
    settings.home_path.mkdir(parents=True, exist_ok=True)
    catalog = open_catalog(settings)
    try:
        catalog.migrate()
        store = open_store(settings)
        store.check()
        try:
            import_base(settings, catalog, store, _bundle(settings))
        except AlreadyExistsError as error:
            if settings.base_path is not None:
                raise
            sys.stderr.write(f"{error.message}; it is kept\n")
    finally:
        catalog.close()


def _bundle(settings: Settings) -> Path:
    folder = settings.base_path or Path(str(resources.files("toile.diffusion") / "tiny_base"))
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no base bundle at {folder}; TOILE_BASE_PATH can name another",
            reason="NO_BASE",
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
