"""The `toile` command."""

import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from toile.cli.commands import (
    dataset,
    generate,
    images,
    jobs,
    models,
    platform,
    rank,
    redraw,
    refine,
    run,
    train,
)
from toile.cli.errors import PlatformFailedError, exit_code
from toile.core.errors import ToileError


class _Group(TyperGroup):
    """Turns errors into one clear line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ToileError as error:
            if ctx.params.get("debug"):
                raise
            _tell(error)
            raise typer.Exit(exit_code(error)) from None


def _tell(error: ToileError) -> None:
    console = Console(stderr=True, highlight=False)
    if isinstance(error, PlatformFailedError) and error.tail:
        console.print(f"[dim]{escape(error.tail)}[/dim]", soft_wrap=True)
    console.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a folder of photographs to ranked, refined designs.",
)


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"toile {metadata.version('toile')}\n")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    del debug, version  # read by the group and by their callback


app.command("run")(run.run)
app.command("up")(platform.up)
app.command("status")(platform.status)
app.command("down")(platform.down)
app.add_typer(dataset.app, name="dataset")
app.add_typer(train.app, name="train")
app.command("generate")(generate.generate)
app.command("batch")(generate.batch)
app.command("redesign")(redraw.redesign)
app.command("inpaint")(redraw.inpaint)
app.command("upscale")(redraw.upscale)
app.command("rank")(rank.rank)
app.command("refine")(refine.refine)
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(images.app, name="images")
app.command("lineage")(images.lineage)


def main() -> None:
    """Run the command line; the process's exit code tells how it went."""
    app()
