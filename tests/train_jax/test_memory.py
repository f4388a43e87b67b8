import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_jax import memory

CHILD = """
import sys
sys.path[:0] = sys.argv[1:]
from train_jax.memory import peak_memory_bytes
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
    assert abs(int(after) - int(during)) < 2**20  # the kernel's counter is exact to some pages
    assert devices == ["None"] * 3  # the CPU does not tell


def test_the_fullest_device_is_told(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device(None), Device({"peak_bytes_in_use": 7}), Device({"peak_bytes_in_use": 9}), Device({})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.peak_memory_bytes().device == 9


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
