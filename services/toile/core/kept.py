"""What was loaded, by a key: each once, and kept as long as there is room."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Kept(Generic[K, T]):
    """Keeps what was loaded; when the budget is spent the longest unused go first.

    Callers of one key wait for one load of it; those of other keys do not. The newest always
    stays, however large it is.
    """

    def __init__(self, budget: float = math.inf, size_of: Callable[[T], int] = lambda _: 1) -> None:
        """Make it empty; it keeps so many, or so much of what `size_of` measures."""
        self._budget = budget
        self._size_of = size_of
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, T] = OrderedDict()
        self._loading: dict[K, Future[T]] = {}

    def get(self, key: K, load: Callable[[], T]) -> T:
        """Return what a key stands for, loaded if it is not here.

        What `load` raises is raised to all who wait for it; the next caller loads again. It may
        get other keys, but not its own.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            ours = key not in self._loading
            loading = self._loading.setdefault(key, Future())
        if not ours:
            return loading.result()
        try:
            entry = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            loading.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._entries[key] = entry
            self._make_room()
        loading.set_result(entry)
        return entry

    def drop(self, *keys: K) -> None:
        """Let go of what these keys stand for; what is being loaded will be kept."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)

    def _make_room(self) -> None:
        sizes = [self._size_of(entry) for entry in self._entries.values()]
        while len(sizes) > 1 and sum(sizes) > self._budget:
            self._entries.popitem(last=False)
            sizes.pop(0)
