"""Where the base that ships with the package is; importable without torch."""

from importlib.resources import files
from pathlib import Path


def shipped_bundle_path() -> Path | None:
    """Return the folder of the tiny base, or None in an installation without it."""
    folder = Path(str(files("toile.diffusion").joinpath("tiny_base")))
    return folder if (folder / "toile.json").is_file() else None
