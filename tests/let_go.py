"""Memory of finished tests is let go, so that a whole run fits a laptop of 8 GB.

A plugin (see conftest.py). JAX keeps every program that it compiled for as long as a process lives, and each module
compiles programs of its own. Those that modules share are compiled anew after a clearing, so that is done only once a
process has grown: a little at the end of a module, much between the tests of one.
"""

import ctypes
import gc
from pathlib import Path

import jax
import pytest

BETWEEN_MODULES = 1 << 30  # bytes that a process may hold; imports alone take 0.4 GiB
BETWEEN_TESTS = 11 << 27


def resident_bytes() -> int | None:
    """What this process holds in memory; None where the system does not tell (it is Linux that does)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def let_go() -> None:
    """Drops compiled programs and unreachable arrays, and gives free memory back to the system."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which otherwise keeps it
    if trim is not None:
        trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """After the fixtures that this test was the last to use."""
    yield
    last = nextitem is None or nextitem.path != item.path
    held = resident_bytes()
    if last if held is None else held > (BETWEEN_MODULES if last else BETWEEN_TESTS):
        let_go()
