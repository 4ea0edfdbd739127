"""The stream of ImportModelVersion: a header, then the file."""

from collections.abc import AsyncIterator
from pathlib import Path

from toile.core.errors import InvalidArgumentError
from toile.core.settings import Limits
from toile.v1 import train_pb2


async def receive(
    requests: AsyncIterator[train_pb2.ImportModelVersionRequest], file: Path, limits: Limits
) -> train_pb2.ImportModelVersionHeader:
    """Write the file of a stream to disk; return the stream's header.

    Raises:
        InvalidArgumentError: A message is out of place (`BAD_MESSAGE_ORDER`), or the file is too
            long (`TOO_MANY_BYTES`).
    """
    header: train_pb2.ImportModelVersionHeader | None = None
    size = most_bytes = 0
    with file.open("wb") as sink:
        async for request in requests:
            if request.HasField("header") != (header is None):
                raise InvalidArgumentError(
                    "the header is the first message and only the first",
                    field="payload",
                    reason="BAD_MESSAGE_ORDER",
                )
            if header is None:
                header = request.header
                most_bytes = (
                    limits.controlnet_bytes if header.controlnet_config else limits.adapter_bytes
                )
            size += sink.write(request.chunk)
            if size > most_bytes:
                raise InvalidArgumentError(
                    f"the file has over {most_bytes:,} bytes",
                    field="chunk",
                    reason="TOO_MANY_BYTES",
                )
    if header is None:
        raise InvalidArgumentError(
            "the stream is empty: no header", field="payload", reason="BAD_MESSAGE_ORDER"
        )
    return header
