"""What most commands begin with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toile.cli.connection import discover
from toile.cli.names import Names
from toile.cli.output import Output
from toile.core.settings import Settings

if TYPE_CHECKING:  # gRPC and the messages take longer to import than all the rest
    from toile.core.rpc.client import Clients


@dataclass(frozen=True)
class Session:
    """A command's connection to the services."""

    settings: Settings
    clients: "Clients"
    names: Names
    output: Output


@contextmanager
def session(*, as_json: bool) -> Iterator[Session]:
    """Connect for the length of a block.

    Raises:
        NoPlatformError: There is nothing to connect to.
    """
    settings = discover(Settings())
    from toile.core.rpc.client import Clients

    with Clients(settings) as clients:
        yield Session(settings, clients, Names(settings), Output(as_json=as_json))
