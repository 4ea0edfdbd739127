"""`toile run`: a whole loop from one file."""

from pathlib import Path
from typing import Annotated

import typer

from toile.cli.output import JsonFlag


def run(
    loop: Annotated[
        Path, typer.Argument(metavar="LOOP.yaml", help="File that describes the loop.")
    ],
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the platform running at the end.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a whole loop: photographs to ranked and refined designs, with a report."""
    from toile.cli.loop.command import run_loop

    run_loop(loop, keep=keep, as_json=as_json)
