"""What commands write: results to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Write the result as JSON to standard output.")
]

_WIDE = 200


class Output:
    """Writes for a person, or for a program when `as_json`."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # What is piped is read by a program or searched: its lines are not cut to fit.
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
        self.notes = Console(
            stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE
        )

    def data(self, data: Any) -> None:
        """Write the result, when a program reads it."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")

    def say(self, text: str) -> None:
        """Write a line of the result, when a person reads it."""
        if not self.as_json:
            self.console.print(text)

    def note(self, text: str) -> None:
        """Write a line about what is going on."""
        self.notes.print(text, soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = ""
    ) -> None:
        """Write a table, when a person reads it. Cells are plain text."""
        if self.as_json:
            return
        table = Table(
            title=title or None,
            box=None,
            pad_edge=False,
            header_style="bold",
            show_header=any(columns),
        )
        for place, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=place == 0)
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(table)


def size_text(count: float) -> str:
    """Write a number of bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration_text(seconds: float) -> str:
    """Write a duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )
