"""A least-recently-used cache bounded by bytes, safe under threads and empty after pickling."""

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class ByteLRU:
    """Keeps the values used last as long as their sizes sum to at most `max_bytes`; the newest is always kept.

    Threads load different values at the same time, and never one value twice: who asks for what another is loading
    waits for it, and gets its error if it fails.
    """

    def __init__(self, max_bytes: int):
        self.__setstate__({"_max_bytes": max_bytes})

    def get(self, key: Hashable, load: Callable[[], tuple[Any, int]]) -> Any:
        """The value of `key`; if absent, `load()` gives it with its size in bytes, and its errors pass through."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
            loading = self._loading.get(key)
            mine = loading is None
            if mine:
                loading = self._loading[key] = Future()
        if mine:
            self._load(key, load, loading)
        return loading.result()

    def _load(self, key: Hashable, load: Callable[[], tuple[Any, int]], loading: Future) -> None:
        """Loads without the lock, and hands the value, or the error, to everybody who waits for it."""
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
            self._bytes += entry[1]
            while self._bytes > self._max_bytes and len(self._entries) > 1:
                _, (_, size) = self._entries.popitem(last=False)
                self._bytes -= size
        loading.set_result(entry[0])

    @property
    def nbytes(self) -> int:
        """Sum of the sizes held."""
        return self._bytes

    def __getstate__(self) -> dict[str, int]:
        return {"_max_bytes": self._max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self._max_bytes = state["_max_bytes"]
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()
        self._loading: dict[Hashable, Future] = {}
        self._bytes = 0
