"""Log lines: JSON on stderr, with the identity of the work in hand."""

import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from toile.core import logging as logs
from toile.core.context import bind
from toile.core.settings import Settings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_tells_who_and_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "rank")
    with bind(request_id="r1", project="p1", job="j1"):
        structlog.get_logger("x").info("scored", images=3)
    structlog.get_logger("x").info("idle")
    scored, idle = lines(capsys)
    assert {
        "event": "scored",
        "images": 3,
        "level": "info",
        "logger": "x",
        "process": "rank",
        "request_id": "r1",
        "project": "p1",
        "job": "j1",
    }.items() <= scored.items()
    assert scored["time"].endswith("Z")
    assert not {"request_id", "project", "job"} & set(idle)


def test_a_library_s_line_looks_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "rank")
    with bind(request_id="r1"):
        logging.getLogger("some.library").warning("%d of %s", 3, "four")
    (line,) = lines(capsys)
    assert {
        "event": "3 of four",
        "level": "warning",
        "logger": "some.library",
        "request_id": "r1",
        "process": "rank",
    }.items() <= line.items()


def test_a_trace_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "rank")
    try:
        raise ValueError("no\nway")
    except ValueError:
        structlog.get_logger("x").exception("failed")
        logging.getLogger("y").exception("failed too")
    ours, theirs = lines(capsys)
    assert "ValueError: no\nway" in ours["exception"]
    assert "ValueError: no\nway" in theirs["exception"]


def test_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_level="warning"), "rank")
    structlog.get_logger("x").info("hidden")
    logging.getLogger("y").info("hidden")
    structlog.get_logger("x").warning("shown")
    assert [line["event"] for line in lines(capsys)] == ["shown"]


def test_what_is_no_json_is_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "rank")
    structlog.get_logger("x").info("odd", value={1, 2}, path=Settings().home)
    (line,) = lines(capsys)
    assert line["value"] == "{1, 2}"


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "rank")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("careful", UserWarning, stacklevel=1)
    (line,) = lines(capsys)
    assert "careful" in line["event"]


def test_configured_twice_a_line_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(), "toile")
    logs.configure(Settings(), "rank")
    structlog.get_logger("x").info("once")
    (line,) = lines(capsys)
    assert line["process"] == "rank"
