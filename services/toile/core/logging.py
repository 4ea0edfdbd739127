"""Logs: one JSON object a line on stderr, with the identity of the work in hand."""

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from toile.core.context import current
from toile.core.settings import Settings

# Libraries that tell at "info" what only their authors want to know.
_CHATTY = ("alembic", "httpx", "httpcore", "urllib3", "asyncio", "grpc")


def configure(settings: Settings, process: str) -> None:
    """Send the lines of structlog and of stdlib loggers to stderr as JSON.

    Args:
        settings: Gives the level.
        process: Name of this process, in every line.
    """

    def add_identity(
        logger: WrappedLogger,  # noqa: ARG001 - structlog's protocol
        method: str,  # noqa: ARG001
        event: EventDict,
    ) -> EventDict:
        context = current()
        event["process"] = process
        for key in ("request_id", "project", "job"):
            if value := getattr(context, key):
                event.setdefault(key, value)
        return event

    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        add_identity,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(capture=True)
