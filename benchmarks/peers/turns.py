"""What programs that are timed in turns read and print: one repetition for each line of input.

A program prints one JSON object a line, the first after its warm-up:

    {"result": ...}                                           of the first repetition, to be compared
    {"seconds": 0.61, "cpu_seconds": 1.2, "peak_bytes": ...}  of the repetition that a line of input asked for
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP = 1


class Work(NamedTuple):
    """Work to be timed.

    Attributes:
      run: does it, and returns its result when it is done.
      without: work to be subtracted, None for none; a decoded token is a long generation without a short one.
      parts: number by which the difference is divided.
    """

    run: Callable[[], Any]
    without: Callable[[], Any] | None = None
    parts: int = 1

    def times(self) -> tuple[float, float]:
        """Does the work once; returns its wall time and the time of all threads, in seconds."""
        wall, cpu = _times(self.run)
        if self.without is not None:
            less = _times(self.without)
            wall, cpu = wall - less[0], cpu - less[1]
        return wall / self.parts, cpu / self.parts


def _times(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def serve(works: Mapping[str, Callable[[Path], Work]]) -> None:
    """Does the work that the command line names, a repetition for each line of input, until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # packages print too
    folder, name = sys.argv[1:]
    work = works[name](Path(folder))
    print(json.dumps({"result": work.run()}), file=out, flush=True)
    for _ in range(WARM_UP):
        work.times()
    for _ in sys.stdin:
        wall, cpu = work.times()
        print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}), file=out, flush=True)


def peak_bytes() -> int:
    """Returns the largest resident memory of this process so far; 0 on systems other than Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
