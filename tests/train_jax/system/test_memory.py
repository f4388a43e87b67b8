import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_jax.core.errors import UserError
from train_jax.system import memory

CHILD = """
import sys
sys.path[:0] = sys.argv[1:]
from train_jax.system.memory import peak_memory_bytes
peaks = [peak_memory_bytes()]
block = b"x" * (64 << 20)
peaks.append(peak_memory_bytes())
del block
peaks.append(peak_memory_bytes())
print(*(peak.process for peak in peaks), *(peak.device for peak in peaks))
"""


def test_peak_rises_with_an_allocation_and_stays_and_is_not_the_parents():
    large = np.ones(2**27)  # 1 GiB here, in the parent
    child = subprocess.run([sys.executable, "-c", CHILD, *sys.path], capture_output=True, text=True, check=True)
    before, during, after, *devices = child.stdout.split()
    assert 50e6 < int(before) < large.nbytes / 2
    assert abs(int(during) - int(before) - 2**26) < 2**22
    assert abs(int(after) - int(during)) < 2**22  # the kernel counts by core, some pages at a time
    assert devices == ["None"] * 3  # a CPU does not report it


def test_windows_has_no_resource_module(monkeypatch):
    """Without the module the peaks are 0."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("memory_on_windows", memory.__file__)
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    peak = there.peak_memory_bytes()
    assert peak.children == 0 and peak.device is None


PARENT = """
import subprocess, sys
sys.path[:0] = sys.argv[1:]
from train_jax.system import memory
before = memory.peak_memory_bytes()
subprocess.run([sys.executable, "-c", "b'x' * (512 << 20)"], check=True)
after = memory.peak_memory_bytes()
print(before.process, before.children, after.process, after.children, memory.reported_peak())
"""


def test_the_peak_of_a_child_is_reported_separately():
    done = subprocess.run([sys.executable, "-c", PARENT, *sys.path], capture_output=True, text=True, check=True)
    before, none, after, children, reported = map(int, done.stdout.split())
    assert none == 0
    assert 512 << 20 <= children < 640 << 20
    assert after - before < 2**24  # the memory of a child does not count for this process
    assert after < children == reported


def test_a_smaller_child_does_not_count():
    """A child begins as a copy of its parent, so its peak is not reported as more than that."""
    code = PARENT.replace("512 << 20", "1").replace(
        "import subprocess", "large = b'x' * (512 << 20); import subprocess"
    )
    done = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, check=True)
    _, _, process, children, reported = map(int, done.stdout.split())
    assert 0 < children <= process == reported


def test_the_peak_of_a_device_is_reported_if_known(monkeypatch):
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda: memory.PeakMemory(5, 7, 2))
    assert memory.reported_peak() == 2
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda: memory.PeakMemory(5, 3, None))
    assert memory.reported_peak() == 5


OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")


@pytest.mark.parametrize(("size", "parts", "half"), [(48, 1, 24), (3, 1, 1), (48, 8, 24), (24, 8, 8), (16, 8, 8)])
def test_after_running_out_an_evaluation_uses_half_the_rows(size, parts, half):
    assert memory.smaller_batch(OUT, size, parts, "eval.batch_size", "shorten the prompt") == half


def test_an_evaluation_of_one_row_that_runs_out_raises(monkeypatch):
    with pytest.raises(UserError, match=r"evaluation of 8 example\(s\) at once does not fit .*: shorten the prompt"):
        memory.smaller_batch(OUT, 8, 8, "eval.batch_size", "shorten the prompt")
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory.smaller_batch(other, 8, 1, "eval.batch_size", "shorten the prompt")


def test_running_out_with_several_processes_raises(monkeypatch):
    """The other processes are inside the same program and cannot use a smaller batch."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError) as error:
        memory.smaller_batch(OUT, 48, 8, "eval.batch_size", "shorten the prompt")
    assert str(error.value) == (
        "process 0 of 2 ran out of device memory in an evaluation of 48 examples at once, which it computes together "
        "with the others, so that none can use a smaller batch: set config.eval.batch_size to 24 or less and run the "
        "same command again"
    )


def test_the_peak_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device(None), Device({"peak_bytes_in_use": 7}), Device({"peak_bytes_in_use": 9}), Device({})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.peak_memory_bytes().device == 9


def test_free_memory_of_devices_or_else_of_the_host(monkeypatch):
    """CPU devices share three quarters of the host's free memory."""
    monkeypatch.setattr(memory, "host_memory_left", lambda: 8 * 4000)
    assert jax.local_device_count() == 8 and memory.device_memory_limit() == 3000
    monkeypatch.setattr(memory, "host_memory_left", lambda: None)
    assert memory.device_memory_limit() is None

    class Device:
        def __init__(self, used):
            self.memory_stats = lambda: {"bytes_limit": 100, "bytes_in_use": used}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(20), Device(70)])
    assert memory.device_memory_limit() == 30


@pytest.mark.parametrize(("processes", "least"), [(1, 5 << 20 | 7), (2, 3 << 20)])
def test_processes_agree_on_the_least_memory(monkeypatch, processes, least):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", lambda own: np.stack([own, np.int32(3)]))
    assert memory.least_of_processes(5 << 20 | 7) == least
    assert memory.least_of_processes(None) is None


def test_step_memory_counts_arguments_outputs_and_donation():
    def step(state, batch):
        return state + 1.0, jnp.tanh(batch @ batch.T) @ batch  # [512, 512] between the two products

    arguments = jnp.zeros(1024), jnp.zeros((512, 8))
    plain = memory.step_memory(jax.jit(step).lower(*arguments).compile())
    donated = memory.step_memory(jax.jit(step, donate_argnums=0).lower(*arguments).compile())
    assert plain.argument == donated.argument == 4 * (1024 + 512 * 8)
    assert plain.output >= 4 * (1024 + 512 * 8)
    assert (plain.alias, donated.alias) == (0, 4096)
    assert plain.temp >= 4 * 512 * 512
    assert donated.total == donated.argument + donated.output - 4096 + donated.temp


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.50 KiB"),
        (50 * 2**20, "50.0 MiB"),
        (2**30, "1.00 GiB"),
        (2**51, "2048 TiB"),
    ],
)
def test_format_bytes(size, text):
    assert memory.format_bytes(size) == text
