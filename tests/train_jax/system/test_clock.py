import subprocess
import sys
import time

import pytest

import eval as evaluate
import train
from train_jax import loop
from train_jax.config import command_line
from train_jax.system import clock

CHILD = """
import time
time.sleep(1)  # what an import may take
import sys
sys.path[:0] = sys.argv[1:]
from train_jax.system import clock
print(time.perf_counter() - clock.process_began())
"""


def test_a_process_begins_before_its_imports():
    began = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", CHILD, *sys.path], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < time.perf_counter() - began + 0.02  # the kernel counts in 0.01 s


@pytest.mark.parametrize("age", [float("nan"), -5.0, 0.0, 1e7])
def test_an_implausible_age_is_ignored(monkeypatch, age):
    monkeypatch.setattr(clock, "_process_age", lambda: age)
    assert clock.process_began() == clock._IMPORTED


def test_a_system_without_process_times(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(clock.Path, "read_text", missing)
    assert clock.process_began() == clock._IMPORTED


@pytest.mark.parametrize(("entry_point", "called"), [(train, "fit"), (evaluate, "evaluate")])
def test_the_entry_points_count_from_the_start_of_the_process(tmp_path, monkeypatch, entry_point, called):
    from tests.train_jax.runs import arguments

    given = []
    monkeypatch.setattr(loop, called, lambda *args: given.append(args[-1]))
    monkeypatch.setattr(clock, "process_began", lambda: -12.5)
    command_line.run(entry_point.main, arguments(tmp_path / "run", {}))
    assert given == [-12.5]
