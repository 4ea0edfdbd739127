"""`toile up`, `toile status`, `toile down`."""

import asyncio
import signal
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from toile.cli.errors import EXIT_NO_PLATFORM
from toile.cli.output import JsonFlag, Output, duration_text, size_text
from toile.cli.platform import launcher
from toile.cli.platform.state import PartState, PartStatus, PlatformState, running_state
from toile.core.settings import Settings

_COLOURS = {
    PartStatus.READY: "green",
    PartStatus.FAILED: "bold red",
    PartStatus.RESTARTING: "yellow",
    PartStatus.STARTING: "cyan",
}


def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until interrupted, then stop the platform.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start the platform on this machine: Ray, the models and the five services."""
    output, settings = Output(as_json=as_json), Settings()
    started = bring_up(settings, output)
    state = started.state
    output.data({"started": started.ours, **_state_data(state)})
    took = duration_text(state.ready_seconds or 0.0)
    if not started.ours:
        output.say(f"The platform is running (ready in {took} when it was started).")
        return
    output.say(f"[green]Ready[/green] in {took}. What is there: toile status. To stop: toile down.")
    if foreground:
        _stay(settings, state, output)


def bring_up(settings: Settings, output: Output) -> launcher.Started:
    """Start the platform with its parts shown as they come up.

    Raises:
        PlatformFailedError: A part could not be started.
    """
    if not output.notes.is_terminal:
        return launcher.up(settings, _Lines(output))
    with Live(console=output.notes, refresh_per_second=4, transient=True) as live:

        def show(state: PlatformState) -> None:
            live.update(_progress(state))

        return launcher.up(settings, show)


class _Lines:
    """Says once of each part that it is ready, where there is no terminal."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._said: set[str] = set()

    def __call__(self, state: PlatformState) -> None:
        for part in state.parts:
            if part.status is PartStatus.READY and part.name not in self._said:
                self._said.add(part.name)
                took = duration_text(part.ready_seconds or 0.0)
                self._output.note(f"  {part.name:<10} ready in {took}")


def down(as_json: JsonFlag = False) -> None:
    """Stop the platform and everything that it started."""
    output = Output(as_json=as_json)
    with output.notes.status("Stopping the platform"):
        stopped = launcher.down(Settings())
    output.data({"stopped": stopped})
    output.say("The platform is stopped." if stopped else "No platform was running.")


def status(as_json: JsonFlag = False) -> None:
    """Show the parts of the platform. The exit code is 0 only when all are ready."""
    output = Output(as_json=as_json)
    state = running_state(Settings())
    if state is None:
        output.data({"status": "stopped", "parts": []})
        output.say("No platform is running; start one with: toile up")
        raise typer.Exit(EXIT_NO_PLATFORM)
    state = asyncio.run(_asked(state))
    memory = launcher.memory_by_part(state)
    output.data(_state_data(state, memory))
    _table(output, state, memory)
    if state.status is not PartStatus.READY:
        raise typer.Exit(1)


async def _asked(state: PlatformState) -> PlatformState:
    """Ask the services for their health, rather than believe the state file."""
    from toile.cli.platform.parts import SERVICES
    from toile.cli.platform.probes import health_serving

    async def ask(part: PartState) -> PartState:
        if part.status is not PartStatus.READY or part.name not in SERVICES:
            return part
        if await health_serving(part.address)():
            return part
        message = "does not serve: something that it needs is away"
        return part.model_copy(update={"status": PartStatus.WAITING, "message": message})

    parts = tuple(await asyncio.gather(*(ask(part) for part in state.parts)))
    ready = all(part.status is PartStatus.READY for part in parts if not part.background)
    whole = state.status
    if whole is PartStatus.READY and not ready:
        whole = PartStatus.WAITING
    return state.model_copy(update={"parts": parts, "status": whole})


def _stay(settings: Settings, state: PlatformState, output: Output) -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        launcher.wait_until_gone(state)
    except KeyboardInterrupt:
        output.note("Stopping the platform")
        launcher.down(settings)


def _progress(state: PlatformState) -> Group:
    lines: list[Spinner | Text] = []
    for part in state.parts:
        if part.status is PartStatus.STARTING:
            lines.append(Spinner("dots", Text(f"{part.name:<10} starting", style="cyan")))
        elif part.status is PartStatus.READY:
            took = duration_text(part.ready_seconds or 0.0)
            lines.append(Text(f"✓ {part.name:<10} ready in {took}", style="green"))
        else:
            style = _COLOURS.get(part.status, "dim")
            lines.append(Text(f"· {part.name:<10} {part.status.value}", style=style))
    return Group(*lines)


def _table(output: Output, state: PlatformState, memory: dict[str, int]) -> None:
    if output.as_json:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "state", "address", "pid", "memory", "restarts", "metrics"):
        table.add_column(column, justify="right" if column in {"pid", "memory"} else "left")
    for part in state.parts:
        colour = _COLOURS.get(part.status, "dim")
        table.add_row(
            part.name,
            f"[{colour}]{part.status.value}[/]",
            part.address or "-",
            str(part.process.pid) if part.process else "-",
            size_text(memory[part.name]) if part.name in memory else "-",
            str(part.restarts) if part.restarts else "",
            part.metrics_address,
        )
    output.console.print(table)
    if not any(part.name == "triton" for part in state.parts):
        output.say(
            "[yellow]triton[/yellow] is not there: designs are drawn by the models themselves, one "
            "at a time. `make triton` makes its environment."
        )
    for part in state.parts:
        if part.message:
            output.say(f"[yellow]{part.name}[/yellow] {escape(part.message)}")
    output.say(f"{size_text(sum(memory.values()))} in all. Logs: {_log_folder(state)}")


def _log_folder(state: PlatformState) -> str:
    return state.parts[0].log.rpartition("/")[0] if state.parts else ""


def _state_data(state: PlatformState, memory: dict[str, int] | None = None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "status": state.status.value,
        "ready_seconds": state.ready_seconds,
        "supervisor_pid": state.supervisor.pid,
        "addresses": state.addresses,
        "ray_address": state.ray_address,
        "parts": [
            {
                "name": part.name,
                "status": part.status.value,
                "address": part.address,
                "metrics_address": part.metrics_address,
                "pid": part.process.pid if part.process else None,
                "memory_bytes": (memory or {}).get(part.name),
                "restarts": part.restarts,
                "ready_seconds": part.ready_seconds,
                "message": part.message,
                "log": part.log,
            }
            for part in state.parts
        ],
    }
    if memory is not None:
        data["memory_bytes"] = sum(memory.values())
    return data
