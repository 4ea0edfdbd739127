"""What was loaded from artifacts, as long as it fits in memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """Keeps what was loaded by its key; when the budget is spent the longest unused go first.

    The newest always stays, however large it is.
    """

    def __init__(self, budget_bytes: int, size_of: Callable[[T], int]) -> None:
        """Make it empty; `size_of` gives bytes."""
        self._budget_bytes = budget_bytes
        self._size_of = size_of
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str, load: Callable[[], T]) -> T:
        """Return what a key stands for, loaded if it is not here."""
        with self._lock:
            if key not in self._entries:
                self._entries[key] = load()
                self._make_room()
            self._entries.move_to_end(key)
            return self._entries[key]

    def _make_room(self) -> None:
        sizes = [self._size_of(entry) for entry in self._entries.values()]
        while len(sizes) > 1 and sum(sizes) > self._budget_bytes:
            self._entries.popitem(last=False)
            sizes.pop(0)
