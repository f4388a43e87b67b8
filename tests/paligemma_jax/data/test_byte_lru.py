import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from paligemma_jax.data.byte_lru import ByteLRU


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
    assert cache.get("b", lambda: (2, 50)) == 2
    assert cache.get("b", lambda: pytest.fail("loaded twice")) == 2
    assert cache.get("a", lambda: (3, 3)) == 3 and cache.nbytes == 3


def test_a_bound_of_zero_keeps_the_newest_value_alone():
    loads, cache = [], ByteLRU(0)
    for key in "aabba":
        cache.get(key, lambda key=key: (loads.append(key), 4))
    assert loads == ["a", "b", "a"]


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


def test_threads_load_different_values_at_the_same_time():
    """Each load waits for the other to have begun: one after the other they would wait for ever."""
    cache, both = ByteLRU(100), threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        values = pool.map(lambda key: cache.get(key, lambda: (both.wait(), (key, 1))[1]), "ab")
        assert list(values) == ["a", "b"] and cache.nbytes == 2


def test_waiting_threads_get_the_error_of_a_failed_load_and_the_next_call_loads_again():
    cache, begun, go = ByteLRU(100), threading.Event(), threading.Event()

    def load():
        begun.set()
        go.wait(20)
        raise ZeroDivisionError

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", load)
        begun.wait(20)
        second = pool.submit(cache.get, "a", lambda: pytest.fail("loaded twice"))
        while not second.running():
            time.sleep(0.001)
        time.sleep(0.05)
        go.set()
        assert isinstance(first.exception(20), ZeroDivisionError) and isinstance(
            second.exception(20), ZeroDivisionError
        )
    assert cache.get("a", lambda: (7, 1)) == 7


def test_a_pickled_copy_is_empty_and_works():
    cache = ByteLRU(5)
    cache.get("a", lambda: (b"x", 3))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.nbytes == 0 and copy.get("a", lambda: (b"y", 3)) == b"y"
