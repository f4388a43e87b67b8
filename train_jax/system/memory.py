"""Memory, in bytes: what a run took, what a compiled step takes, and the way on for an evaluation that runs out."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train_jax.core.errors import UserError
from train_jax.system.host_memory import host_memory_left

try:
    import resource
except ImportError:  # on Windows
    resource = None


class PeakMemory(NamedTuple):
    """Highest use so far, in bytes.

    Attributes:
      process: resident memory of this process.
      children: of the largest process that this one started and that has ended (render and reader processes, and what
        they started in turn); 0 where there was none. One still at work does not count yet.
      device: of the fullest local device; None where it does not tell (CPU).
    """

    process: int
    children: int
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
    """Peak resident memory of this process and of its children (0 on Windows), and that on its fullest accelerator."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return PeakMemory(_peak_process_bytes(), _peak_rusage_bytes("RUSAGE_CHILDREN"), max(peaks, default=None))


def reported_peak() -> int:
    """The one number that a run reports, in bytes: the peak of its fullest device; where devices do not tell, that of
    the largest single process, be it this one or one of its children.

    Peaks of processes are not added: they need not fall together, and the kernel tells the largest child alone.
    """
    peak = peak_memory_bytes()
    return peak.device or max(peak.process, peak.children)


def _peak_process_bytes() -> int:
    # Linux's ru_maxrss survives exec: a process started by a large one would report the large one's peak. VmHWM is
    # this program's own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_rusage_bytes("RUSAGE_SELF")


def _peak_rusage_bytes(who: str) -> int:
    """Of a constant of `resource`; 0 on Windows, which has no such module."""
    if resource is None:
        return 0
    # A child counts from its fork on, when it shares all memory of this process: never more than this one's own peak.
    peak = resource.getrusage(getattr(resource, who)).ru_maxrss
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


def smaller_batch(error: Exception, size: int, parts: int, key: str, remedy: str) -> int:
    """How many rows at once to go on with, after `error` ended an evaluation of `size` rows: about half of them.

    Args:
      error: what the computation raised.
      size: rows of the batch over all devices, a multiple of `parts`.
      parts: devices that share a batch; the answer is a multiple of it, at least `parts`.
      key: the config key that says how many rows, for the sentence to several processes.
      remedy: what to change where not even one row a device fits, the end of that sentence.

    Several processes never go on: a batch is one program over the devices of all, and the others are in the midst of
    it, waiting for what the one that failed does not send any more. They cannot hear of a smaller batch, so the run
    ends with a sentence (and JAX ends the processes that wait). What processes can agree on is a size chosen before
    anything runs, by what the compiler says that it takes.

    Raises:
      UserError: one row a device does not fit, or there are several processes.
      Exception: `error` itself, if it is not about the device's memory.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
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
            f"{size} examples at once, which it computes together with the others, so that none can go on with fewer: "
            f"set config.{key} to {half} or less and run the same command again"
        ) from error
    return half


def device_memory_limit() -> int | None:
    """Bytes still free on the fullest local device; None where nobody tells.

    CPU devices do not: each is given its part of three quarters of what the host has left. The last quarter is for
    other programs, and for what a computation takes beside what the compiler planned.
    """
    devices = jax.local_devices()
    stats = [device.memory_stats() or {} for device in devices]
    free = [stat["bytes_limit"] - stat["bytes_in_use"] for stat in stats if "bytes_limit" in stat]
    if free or jax.default_backend() != "cpu":
        return min(free, default=None)
    left = host_memory_left()
    return None if left is None else left * 3 // 4 // len(devices)
