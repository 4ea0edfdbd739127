"""Free ports that stay free.

Ports are chosen before the parts start, so that all can start at once and a part that comes
back is found where it was. They are taken from below the system's ephemeral range: from
inside it, some outgoing connection could have taken a port by the time it is wanted.
"""

import random
import socket
from pathlib import Path

from toile.core.errors import ExhaustedError

_LOWEST = 20_000
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 2_000


def free_ports(host: str, count: int) -> list[int]:
    """Return distinct ports that nothing listens on.

    Raises:
        ExhaustedError: None are left.
    """
    draw = random.SystemRandom()
    ceiling = _ephemeral_floor()
    found: set[int] = set()
    for _ in range(_TRIES):
        if len(found) == count:
            return sorted(found)
        port = draw.randrange(_LOWEST, ceiling)
        if port not in found and _is_free(host, port):
            found.add(port)
    raise ExhaustedError(f"no {count} free ports between {_LOWEST} and {ceiling}")


def _ephemeral_floor() -> int:
    try:
        floor = int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
    return floor if floor > _LOWEST + 4_000 else 65_000


def _is_free(host: str, port: int) -> bool:
    for address in {host, "0.0.0.0"}:  # noqa: S104 - Ray listens on all addresses
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True
