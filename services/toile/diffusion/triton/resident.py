"""Adapters in the server's memory: read by link in threads, dropped by name or for room."""

import http.client
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from toile.diffusion.bank import BankError, BankLayout, PackedAdapter

ADAPTERS = "adapters"
"""The front's input that names a sample's adapters; the others are the graph's."""
UNLOAD = "unload"
"""The parameter of a request that has the front drop an adapter."""
MISSING = "ADAPTER_NOT_RESIDENT"
"""How an error begins that the caller answers by calling again with a link to the adapter."""
LOADING = "ADAPTER_LOADING"
"""How an error begins after which the caller calls again in a moment."""
UNREAD = "ADAPTER_NOT_READ"
"""How an error begins after which the caller calls again with a new link: the store may have failed
for a moment, the link may be too old, or the file be gone, which whoever gives links sees to."""
LOADERS = 2
LOAD_SECONDS = 30.0

Place = Callable[[PackedAdapter], PackedAdapter]
"""Brings an adapter's arrays to where the engine wants them."""


class ResidentAdapters:
    """Packed adapters in memory, within a budget of bytes; the least recently used go first.

    They are read in threads: the batches of those who have theirs do not wait for it. The methods
    are for one thread, the one that runs the engine.
    """

    def __init__(self, layout: BankLayout, budget_bytes: int, place: Place) -> None:
        self._layout, self._budget, self._place = layout, budget_bytes, place
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._loading: dict[str, Future[tuple[PackedAdapter, float]]] = {}
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="adapters")
        self.bytes = 0
        self.loaded: list[float] = []
        """Seconds that each load took since somebody last emptied the list."""

    def get(self, key: str, link: str = "") -> PackedAdapter:
        """Return an adapter that is in memory; with a link, begin to read one that is not.

        Raises:
            BankError: It is not there (`ADAPTER_NOT_RESIDENT`), not yet (`ADAPTER_LOADING`), the
                link led nowhere (`ADAPTER_NOT_READ`), or what it leads to is no adapter for this
                UNet.
        """
        found = self._adapters.get(key)
        if found is not None:
            self._adapters.move_to_end(key)
            return found
        under_way = self._loading.get(key)
        if under_way is None:
            if not link:
                raise BankError(f"{MISSING} {key}")
            self._loading[key] = self._threads.submit(self._read, link)
            raise BankError(f"{LOADING} {key}")
        if not under_way.done():
            raise BankError(f"{LOADING} {key}")
        return self._keep(key)

    def wait(self, seconds: float) -> None:
        """Wait until what is being read is there, or for so long."""
        wait(self._loading.values(), timeout=seconds)

    def unload(self, key: str) -> bool:
        """Drop an adapter, or what is being read of it; returns whether there was one.

        Whoever still draws with it has it read again.
        """
        under_way = self._loading.pop(key, None)
        adapter = self._adapters.pop(key, None)
        if adapter is not None:
            self.bytes -= adapter.size_bytes
        return adapter is not None or under_way is not None

    def shrink(self) -> int:
        """Drop what is over the budget, what was read and not asked for again included.

        Returns how many.
        """
        for key in [key for key, read in self._loading.items() if read.done()]:
            if self._loading[key].exception() is None:  # an error is for whoever asks
                self._keep(key)
        dropped = 0
        while self.bytes > self._budget and len(self._adapters) > 1:
            _, adapter = self._adapters.popitem(last=False)
            self.bytes -= adapter.size_bytes
            dropped += 1
        return dropped

    def _keep(self, key: str) -> PackedAdapter:
        """Take what was read into the budget, as the last that was used."""
        adapter, seconds = self._loading.pop(key).result()
        self.loaded.append(seconds)
        self._adapters[key] = adapter
        self.bytes += adapter.size_bytes
        return adapter

    def _read(self, link: str) -> tuple[PackedAdapter, float]:
        started = time.monotonic()
        adapter = self._place(read_packed(link, self._layout))
        return adapter, time.monotonic() - started


def read_packed(link: str, layout: BankLayout) -> PackedAdapter:
    """Return the packed adapter that a `file:` or `https:` link leads to.

    Raises:
        BankError: It cannot be read (`ADAPTER_NOT_READ`), or is no packed adapter for this layout.
    """
    parts = urllib.parse.urlsplit(link)
    if parts.scheme == "file":
        file = Path(urllib.parse.unquote(parts.path))
        if not file.is_file():
            raise BankError(f"{UNREAD} {file.name} is not a packed adapter: No such file")
        return PackedAdapter.load(file, layout)
    if parts.scheme not in {"http", "https"}:
        raise BankError(f"{parts.scheme or 'no scheme'}: is no link to an adapter")
    try:
        with urllib.request.urlopen(link, timeout=LOAD_SECONDS) as answer:  # noqa: S310
            data = bytearray(answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise BankError(f"{UNREAD} the adapter could not be read: {error}") from error
    return PackedAdapter.parse(data, layout, "what was read")
