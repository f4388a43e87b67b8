"""The start time of this process. Imports quickly, so that an entry point can call it first."""

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()
LONGEST_START = 600.0  # largest plausible time, in seconds, from the start of a process to the import of this module


def process_began() -> float:
    """Returns the start time of this process on the clock of `time.perf_counter`, so that imports are included.

    If the system does not report it, or reports an implausible time (containers may shift a clock), returns the time at
    which this module was imported.
    """
    began = time.perf_counter() - _process_age()
    return began if 0 <= _IMPORTED - began < LONGEST_START else _IMPORTED


def _process_age() -> float:
    """Returns the seconds since the kernel started this process; NaN on systems other than Linux."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from field 3 on, see man 5 proc
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        return float("nan")
