"""What a run takes: peak memory of the process and its devices, and memory of a compiled step. All in bytes."""

import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax


class PeakMemory(NamedTuple):
    """Highest use so far, in bytes; `device` is that of the fullest local device, None where it does not tell (CPU)."""

    process: int
    device: int | None


class StepMemory(NamedTuple):
    """Memory of one compiled function on one device, in bytes: `alias` is the part of `output` that reuses donated
    arguments, so that the device holds `argument + output - alias + temp` while it runs.
    """

    argument: int
    output: int
    temp: int
    alias: int

    @property
    def total(self) -> int:
        return self.argument + self.output - self.alias + self.temp


def peak_memory_bytes() -> PeakMemory:
    """Peak resident memory of this process, and the peak on its fullest accelerator."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return PeakMemory(_peak_process_bytes(), max(peaks, default=None))


def _peak_process_bytes() -> int:
    # Linux's ru_maxrss survives exec: a process started by a large one would report the large one's peak. VmHWM is
    # this program's own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def step_memory(compiled: jax.stages.Compiled) -> StepMemory | None:
    """Memory that the compiler planned for `jax.jit(f).lower(...).compile()`; None where the backend does not tell."""
    analysis: Any = compiled.memory_analysis()
    if analysis is None:
        return None
    return StepMemory(
        argument=analysis.argument_size_in_bytes,
        output=analysis.output_size_in_bytes,
        temp=analysis.temp_size_in_bytes,
        alias=analysis.alias_size_in_bytes,
    )


def format_bytes(size: int | float) -> str:
    """Three figures with a binary unit: 1536 is "1.50 KiB"."""
    power = 0
    while size >= 1000 and power < 4:
        size, power = size / 1024, power + 1
    decimals = 0 if power == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{decimals}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def device_memory_limit() -> int | None:
    """Bytes still free on the fullest local device; None where devices do not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = [stat["bytes_limit"] - stat["bytes_in_use"] for stat in stats if "bytes_limit" in stat]
    return min(free, default=None)
