import pickle
import threading
import time

import pytest

from paligemma_jax.data.lru import ByteLRU


def test_keeps_what_was_used_last_within_the_bytes():
    loads, cache = [], ByteLRU(10)

    def get(key, size=4):
        return cache.get(key, lambda: (loads.append(key) or key.upper(), size))

    assert [get(k) for k in "abab"] == ["A", "B", "A", "B"] and loads == ["a", "b"]
    get("a")
    get("c")  # 12 bytes: b, used longest ago, goes
    assert cache.nbytes == 8
    get("a"), get("b")
    assert loads == ["a", "b", "c", "b"]


def test_a_value_larger_than_the_bound_is_kept_alone():
    cache = ByteLRU(10)
    cache.get("a", lambda: (1, 3))
    assert cache.get("b", lambda: (2, 50)) == 2 and cache.nbytes == 50
    assert cache.get("b", lambda: pytest.fail("loaded twice")) == 2


def test_a_failed_load_leaves_no_trace():
    cache = ByteLRU(10)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", lambda: (7, 1)) == 7 and cache.nbytes == 1


def test_threads_load_each_value_once():
    cache, loads = ByteLRU(100), []

    def load():
        time.sleep(0.02)
        loads.append(1)
        return "value", 1

    threads = [threading.Thread(target=cache.get, args=("key", load)) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(loads) == 1


def test_a_pickled_copy_is_empty_and_works():
    cache = ByteLRU(5)
    cache.get("a", lambda: (b"x", 3))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.nbytes == 0 and copy.get("a", lambda: (b"y", 3)) == b"y"
