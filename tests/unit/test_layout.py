"""Rules of the source tree that import-linter cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import toile

PACKAGE = Path(toile.__file__).parent


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_one_module_speaks_to_ray_train() -> None:
    speakers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == "ray.train" or name.startswith("ray.train.") for name in imports(path))
    }
    assert speakers == {"training/worker.py"}


def test_only_settings_read_the_environment() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "os.environ" in (text := path.read_text(encoding="utf-8")) or "getenv(" in text
    }
    # The platform passes its own environment on to the processes that it starts.
    # The platform passes its environment on; the processes of torch and Ray read what those set.
    elsewhere = ("cli/platform/", "serving/", "training/", "dataset/build/")
    others = {path for path in readers if not path.startswith(elsewhere)}
    assert others == set()


@pytest.mark.parametrize(
    "module",
    [
        "toile.cli.main",
        "toile.dataset.servicer",
        "toile.train.servicer",
        "toile.generate.servicer",
        "toile.rank.servicer",
        "toile.refine.servicer",
    ],
)
def test_a_service_starts_without_torch_and_ray(module: str) -> None:
    heavy = "{'torch', 'ray', 'diffusers', 'transformers', 'peft'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
