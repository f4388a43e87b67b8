"""When this process began. Imports nothing slow, so that an entry point may ask first of all."""

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()
LONGEST_START = 600.0  # seconds from the start of a process to the import of this module, at most


def process_began() -> float:
    """The time at which this process began on the clock of `time.perf_counter`, so that its imports count as well.

    Where the system does not tell, or tells a time that cannot be (containers may shift one of its clocks): when this
    module was imported.
    """
    began = time.perf_counter() - _process_age()
    return began if 0 <= _IMPORTED - began < LONGEST_START else _IMPORTED


def _process_age() -> float:
    """Seconds since the kernel started this process; NaN where it does not tell (it is Linux that does)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on, see man 5 proc
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        return float("nan")
