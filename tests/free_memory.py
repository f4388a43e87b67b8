"""Frees the memory of finished tests, so that the whole suite fits a laptop with 8 GB.

A plugin (see conftest.py). JAX keeps every compiled program for the lifetime of a process. After clearing, programs
that several modules share are compiled again, so caches are cleared only once a process has grown above a limit, which
is lower at the end of a module than between its tests.
"""

import ctypes
import gc
from pathlib import Path

import jax
import pytest

BETWEEN_MODULES = 1024 << 20  # bytes that a process may hold; imports alone take 0.4 GiB
BETWEEN_TESTS = 1408 << 20


def resident_bytes() -> int | None:
    """Returns the resident memory of this process; None on systems other than Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def free_memory() -> None:
    """Frees compiled programs and unreachable arrays, and returns free memory to the system."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc otherwise keeps free memory
    if trim is not None:
        trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Frees memory after the teardown of the test and its fixtures."""
    yield
    last = nextitem is None or nextitem.path != item.path
    held = resident_bytes()
    if last if held is None else held > (BETWEEN_MODULES if last else BETWEEN_TESTS):
        free_memory()
