"""Files as streams of messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20  # what the API's `chunk` fields hold at most


def chunks(source: bytes | Path | BinaryIO) -> Iterator[bytes]:
    """Cut bytes, a file or an open file into pieces of at most `CHUNK_BYTES`."""
    if isinstance(source, bytes):
        for start in range(0, len(source), CHUNK_BYTES):
            yield source[start : start + CHUNK_BYTES]
    elif isinstance(source, Path):
        with source.open("rb") as file:
            yield from chunks(file)
    else:
        while piece := source.read(CHUNK_BYTES):
            yield piece
