"""What is copied for the front is all that it imports of this package."""

import ast
from pathlib import Path

import toile
from toile.diffusion.triton.repository import SERVER_MODULES

PACKAGE = Path(toile.__file__).parent


def own_imports(path: Path) -> set[str]:
    """Files of this package that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toile"):
            parts = str(node.module).split(".")[1:]
            module = "/".join(parts)
            found.add(f"{module}.py" if (PACKAGE / f"{module}.py").is_file() else module)
    return found


def test_the_copies_need_nothing_else_of_the_package() -> None:
    front = "diffusion/triton/front.py"
    for path in (front, *SERVER_MODULES):
        assert own_imports(PACKAGE / path) <= set(SERVER_MODULES), path
    packages = {str(Path(path).parent / "__init__.py") for path in SERVER_MODULES}
    assert packages <= set(SERVER_MODULES)
    imported = set().union(*(own_imports(PACKAGE / path) for path in (front, *SERVER_MODULES)))
    assert {path for path in SERVER_MODULES if not path.endswith("__init__.py")} == imported
