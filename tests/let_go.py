"""Memory of finished test modules is let go, so that a whole run of the tests fits a small machine.

A plugin (see conftest.py). JAX keeps every program that it compiled, with the constants in it, for as long as a process
lives, and each module compiles programs of its own. Programs that modules share are compiled anew after a clearing, so
that is done only once a process has grown.
"""

import ctypes
import gc
from pathlib import Path

import jax
import pytest

BOUND = 1 << 30  # bytes: of a process that holds no more, nothing is let go. Imports alone take 0.4 GiB.


def resident_bytes() -> float:
    """What this process holds in memory; infinity where the system does not tell (it is Linux that does)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("inf")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def let_go() -> None:
    """Drops compiled programs and unreachable arrays, and gives free memory back to the system."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which otherwise keeps it
    if trim is not None:
        trim(0)


@pytest.fixture(scope="module", autouse=True)
def finished_modules_are_let_go():
    """After the module's own fixtures, as this one comes before them."""
    yield
    if resident_bytes() > BOUND:
        let_go()
