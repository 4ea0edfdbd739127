"""The stream of ImportImages: a header, then files as a start and chunks."""

import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, assert_never

from toile.core.errors import InvalidArgumentError
from toile.v1 import dataset_pb2


@dataclass(frozen=True)
class ReceivedFile:
    """A file that has arrived whole. `path` is gone once the next one is asked for."""

    file_name: str
    caption: str
    path: Path


class Spool:
    """A file on its way in. Bytes beyond the limit are counted out: the file is refused anyway."""

    def __init__(self, folder: Path, start: dataset_pb2.FileStart, most_bytes: int) -> None:
        self._path = folder / "file"
        self._file: BinaryIO = self._path.open("wb")
        self._start = start
        self._room = most_bytes + 1

    def write(self, chunk: bytes) -> None:
        """Keep the next bytes; one byte over the limit is enough to tell that it is too long."""
        kept = chunk[: self._room]
        self._file.write(kept)
        self._room -= len(kept)

    def finish(self) -> ReceivedFile:
        """End the file."""
        self._file.close()
        return ReceivedFile(self._start.file_name, self._start.caption, self._path)

    def close(self) -> None:
        """Let go of a file that may be incomplete."""
        self._file.close()


class Upload:
    """Reads one ImportImages stream. One file is held at a time, on disk.

    Use it as a context manager: it removes what it spooled.
    """

    def __init__(
        self, requests: AsyncIterator[dataset_pb2.ImportImagesRequest], most_bytes: int
    ) -> None:
        self._requests = requests
        self._most_bytes = most_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="toile-import-")
        self._spool: Spool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._spool is not None:
            self._spool.close()
        self._folder.cleanup()

    async def header(self) -> str:
        """Return the name of the dataset, from the first message.

        Raises:
            InvalidArgumentError: The stream begins with something else, or is empty.
        """
        async for request in self._requests:
            if request.WhichOneof("payload") == "header":
                return request.header.dataset
            break
        raise _wrong("the first message must be the header")

    async def files(self) -> AsyncIterator[ReceivedFile]:
        """Return the files as they become complete.

        Raises:
            InvalidArgumentError: A message is out of place.
        """
        async for request in self._requests:
            payload = request.WhichOneof("payload")
            match payload:
                case "file":
                    if self._spool is not None:
                        yield self._spool.finish()
                    self._spool = Spool(Path(self._folder.name), request.file, self._most_bytes)
                case "chunk":
                    if self._spool is None:
                        raise _wrong("a chunk must follow the start of its file")
                    self._spool.write(request.chunk)
                case "header":
                    raise _wrong("only the first message may be the header")
                case None:
                    raise _wrong("a message has no payload")
                case _:
                    assert_never(payload)
        if self._spool is not None:
            yield self._spool.finish()


def _wrong(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="payload", reason="BAD_MESSAGE_ORDER")
