"""Generate services/toile/v1 from protos/; with --check, compare it with what is committed."""

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("toile/v1")


def generate(out: Path) -> None:
    """Write the generated package under `out`."""
    protos = sorted((ROOT / "protos" / PACKAGE).glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{ROOT / 'protos'}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        sys.exit(1)
    (out / PACKAGE / "__init__.py").write_text(
        '"""Generated from protos/toile/v1; never edited."""\n'
    )


def main() -> None:
    """Generate, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    committed = ROOT / "services" / PACKAGE
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / PACKAGE
        if not check:
            shutil.rmtree(committed, ignore_errors=True)
            shutil.copytree(fresh, committed)
            return
        names = {p.name for d in (fresh, committed) for p in d.iterdir() if p.is_file()}
        stale = sorted(filecmp.cmpfiles(fresh, committed, names, shallow=False)[1]) + sorted(
            filecmp.cmpfiles(fresh, committed, names, shallow=False)[2]
        )
        if stale:
            sys.exit(f"generated code differs from protos/ ({', '.join(stale)}): run make protos")


if __name__ == "__main__":
    main()
