"""`toile run` from beginning to end: platform, steps, results, figures."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import typer

from toile.cli.commands.platform import bring_up
from toile.cli.connection import discover, is_complete
from toile.cli.errors import EXIT_INTERRUPTED
from toile.cli.folder import read_folder
from toile.cli.loop.config import LoopConfig, load_config
from toile.cli.loop.display import Display
from toile.cli.loop.figures import Figures, show_figures
from toile.cli.loop.memory import MemorySampler
from toile.cli.loop.results import collect, write_pictures, write_report
from toile.cli.loop.runner import Outcome, Runner
from toile.cli.names import Names
from toile.cli.output import Output
from toile.cli.platform import launcher
from toile.core.errors import FailedPreconditionError
from toile.core.rpc.client import Clients
from toile.core.settings import Settings


def run_loop(path: Path, *, keep: bool, as_json: bool) -> None:
    """Run a loop file and write its results.

    Raises:
        InvalidArgumentError: The file or its folder of photographs is wrong.
        ToileError: A step failed.
    """
    output, settings = Output(as_json=as_json), Settings()
    _check_packages()
    config = load_config(path)
    folder = read_folder(config.dataset.folder)
    display = Display(output)
    began = time.monotonic()
    try:
        with _interruptible(), _platform(settings, output, keep=keep) as started:
            state = started.state if started is not None else None
            with MemorySampler(state) as memory, Clients(discover(settings)) as clients:
                names = Names(settings)
                runner = Runner(config, folder, clients, names, display, memory)
                outcome = runner.run()
                figures = _write(config, clients, outcome, memory, started, began, display)
                runner.finish()
    except KeyboardInterrupt:
        output.note(
            "Interrupted. What was finished is kept; the same command goes on from there:\n"
            f"  toile run {path}"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    output.data(figures.as_data(config.out))
    show_figures(output, figures, config.out)


def _check_packages() -> None:
    """Say at once, not after the training, that the report cannot be drawn."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise FailedPreconditionError(
            f"toile run needs {' and '.join(missing)}: pip install 'toile[report]'"
        )


def _write(
    config: LoopConfig,
    clients: Clients,
    outcome: Outcome,
    memory: MemorySampler,
    started: launcher.Started | None,
    began: float,
    display: Display,
) -> Figures:
    report_began = time.monotonic()
    with display.running("report"):
        found = collect(config, clients, outcome.results)
        write_pictures(found)
        figures = Figures.of(outcome, memory, started, began, report_began)
        write_report(found, figures)
    display.done("report", str(config.out / "report.html"), time.monotonic() - report_began)
    return figures


@contextmanager
def _platform(
    settings: Settings, output: Output, *, keep: bool
) -> Iterator[launcher.Started | None]:
    """Have a platform for a block; what was started for it is stopped after it."""
    if is_complete(settings):
        yield None
        return
    started = bring_up(settings, output)
    if started.ours:
        output.note(f"[green]✓[/green] platform   ready in {started.state.ready_seconds:.1f} s")
    try:
        yield started
    finally:
        if started.ours and not keep:
            output.note("Stopping the platform")
            launcher.down(settings)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C for a block; a second one does not cut the tidying short."""
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
