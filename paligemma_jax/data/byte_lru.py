"""A least-recently-used cache bounded by bytes, safe under threads and empty after pickling."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from cachetools import LRUCache


class ByteLRU:
    """Keeps the values used last as long as their sizes sum to at most `max_bytes`; the newest is always kept.

    Threads load different values at the same time, and never one value twice: a thread that needs a value that another
    is loading waits for it, and gets its error if it fails.
    """

    def __init__(self, max_bytes: int):
        self.__setstate__({"_max_bytes": max_bytes})

    def get(self, key: Hashable, load: Callable[[], tuple[Any, int]]) -> Any:
        """Returns the value of `key`; if absent, calls `load`, which returns it with its size in bytes or raises."""
        with self._lock:
            if key in self._entries:
                return self._entries[key][0]
            loading = self._loading.get(key)
            mine = loading is None
            if mine:
                loading = self._loading[key] = Future()
        if mine:
            self._load(key, load, loading)
        return loading.result()

    def _load(self, key: Hashable, load: Callable[[], tuple[Any, int]], loading: Future) -> None:
        """Loads without the lock, and hands the value, or the error, to every thread that waits for it."""
        try:
            entry = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            loading.set_exception(error)
            return
        with self._lock:
            del self._loading[key]
            self._entries[key] = entry
        loading.set_result(entry[0])

    @property
    def nbytes(self) -> int:
        """Sum of the sizes of the values kept; a larger one counts as `max_bytes`."""
        return int(self._entries.currsize)

    def __getstate__(self) -> dict[str, int]:
        return {"_max_bytes": self._max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self._max_bytes = state["_max_bytes"]
        self._lock = threading.Lock()
        bound = max(self._max_bytes, 1)  # 0 keeps the newest value alone, too
        self._entries: LRUCache[Hashable, tuple[Any, int]] = LRUCache(
            bound, getsizeof=lambda entry: min(entry[1], bound)
        )
        self._loading: dict[Hashable, Future] = {}
