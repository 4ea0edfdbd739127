"""Tables in `benchmarks/README.md`, between marks that name their benchmark."""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def replace_part(name: str, text: str) -> None:
    """Replace what is between a benchmark's marks.

    Raises:
        ValueError: The README has no marks of that name.
    """
    begin, end = f"<!-- {name}: rendered from results.json -->", f"<!-- /{name} -->"
    before, found_begin, rest = README.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{README} has no place for the results of {name}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
