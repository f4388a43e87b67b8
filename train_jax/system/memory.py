"""Memory in bytes: peaks of a run, plans of compiled functions, and a smaller batch after running out."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from train_jax.core.errors import UserError
from train_jax.system.host_memory import host_memory_left

try:
    import resource
except ImportError:  # on Windows
    resource = None


class PeakMemory(NamedTuple):
    """Peak memory so far, in bytes.

    Attributes:
      process: resident memory of this process.
      children: resident memory of the largest descendant process that has ended, such as a renderer or reader; 0 if
        there is none. Running processes do not count yet.
      device: memory of the fullest local device; None if it is not reported (CPU).
    """

    process: int
    children: int
    device: int | None


class StepMemory(NamedTuple):
    """Memory of one compiled function on one device, in bytes.

    `alias` is the part of `output` that reuses donated arguments.
    """

    argument: int
    output: int
    temp: int
    alias: int

    @property
    def needed(self) -> int:
        """Memory that the function needs beside its arguments."""
        return self.output - self.alias + self.temp

    @property
    def total(self) -> int:
        """Memory in use while the function runs."""
        return self.argument + self.needed


def peak_memory_bytes() -> PeakMemory:
    """Returns the peak memory of this process, of its children (both 0 on Windows), and of its fullest device."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return PeakMemory(_peak_process_bytes(), _peak_rusage_bytes("RUSAGE_CHILDREN"), max(peaks, default=None))


def reported_peak() -> int:
    """Returns the `peak_memory_bytes` of a run's results.

    This is the peak of the fullest device. If devices do not report it, it is the peak of the largest process among
    this one and its children. Peaks of processes are not added, since they need not coincide and the kernel reports
    only the largest child.
    """
    peak = peak_memory_bytes()
    return peak.device or max(peak.process, peak.children)


def _peak_process_bytes() -> int:
    # Linux keeps ru_maxrss across exec, so a process started by a larger one would report that one's peak. VmHWM
    # belongs to this program alone.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_rusage_bytes("RUSAGE_SELF")


def _peak_rusage_bytes(who: str) -> int:
    """Returns the peak for a constant of `resource`; 0 on Windows, which lacks the module."""
    if resource is None:
        return 0
    # A child counts from its fork on, when it shares the memory of this process, so its peak may be this process's.
    peak = resource.getrusage(getattr(resource, who)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def step_memory(compiled: jax.stages.Compiled) -> StepMemory | None:
    """Returns the memory that the compiler planned for a compiled function; None if the backend does not report it."""
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
    """Formats bytes with three digits and a binary unit: 1536 is "1.50 KiB"."""
    power = 0
    while size >= 1000 and power < 4:
        size, power = size / 1024, power + 1
    decimals = 0 if power == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{decimals}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def ran_out_of_memory(error: Exception) -> bool:
    """Returns whether an exception, or the one that caused it, says that the memory of a device is exhausted."""
    return any("RESOURCE_EXHAUSTED" in str(each) for each in (error, error.__cause__))


def smaller_batch(error: Exception, size: int, parts: int, key: str, remedy: str) -> int:
    """Returns the batch size to retry with, about half, after an evaluation ran out of device memory.

    With several processes there is no retry: a batch is one program over all devices, in which the other processes wait
    for the one that failed, so they cannot agree on a smaller size, and the run ends with an error. Several processes
    need a size chosen before the run, from the memory that the compiler plans.

    Args:
      error: the exception of the computation.
      size: rows of the batch over all devices, a multiple of `parts`.
      parts: devices that share a batch; the result is a multiple of it, at least `parts`.
      key: config key of the batch size, for the message with several processes.
      remedy: what to change if one row on each device does not fit, the end of that message.

    Raises:
      UserError: one row on each device does not fit, or there are several processes.
      Exception: `error` itself, if it is not an out-of-memory error.
    """
    if not ran_out_of_memory(error):
        raise error
    half = max(size // 2 // parts, 1) * parts
    if size <= parts:
        raise UserError(
            f"evaluation of {size} example(s) at once does not fit the device's memory, expected at least one on each "
            f"device: {remedy}"
        ) from error
    if jax.process_count() > 1:
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()} ran out of device memory in an evaluation of "
            f"{size} examples at once, which it computes together with the others, so that none can use a smaller "
            f"batch: set config.{key} to {half} or less and run the same command again"
        ) from error
    return half


def device_memory_limit() -> int | None:
    """Returns the free bytes of the fullest local device; None if they are not reported.

    CPU devices do not report memory; each gets an equal part of three quarters of the host's free memory. The last
    quarter is left for other programs and for memory that the compiler does not plan.
    """
    free = free_device_memory()
    if free is not None or jax.default_backend() != "cpu":
        return free
    left = host_memory_left()
    return None if left is None else left * 3 // 4 // jax.local_device_count()


def free_device_memory() -> int | None:
    """Returns the bytes that the fullest local device reports to be free; None if none reports them (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return min((stat["bytes_limit"] - stat["bytes_in_use"] for stat in stats if "bytes_limit" in stat), default=None)


def least_of_processes(limit: int | None) -> int | None:
    """Returns the smallest limit of all processes, which all choose by it alike, in steps of 1 MiB; None stays None."""
    if limit is None or jax.process_count() == 1:
        return limit
    return int(multihost_utils.process_allgather(np.int32(limit >> 20)).min()) << 20
