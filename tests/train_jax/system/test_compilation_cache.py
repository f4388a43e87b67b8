"""A second start compiles nothing: the programs are on disk."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train_jax.system.compilation_cache import enable  # tests/fast_compile.py replaces that of commands

ROOT = Path(__file__).resolve().parents[3]
# Runs a command's main and prints how many programs were compiled, and how many read.
COUNTED = """
import collections, json, sys
sys.path[:0] = [sys.argv.pop(1)]
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
from {module} import main
main(sys.argv)
counts = [events["/jax/compilation_cache/cache_" + name] for name in ("misses", "hits")]
print(json.dumps(counts))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls `run(module, *arguments) -> (compiled, read)` in a process of its own with a cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def counted(module, *arguments):
        command = [sys.executable, "-c", COUNTED.format(module=module), str(ROOT), *arguments]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    return counted


def test_a_second_start_compiles_nothing(run, tmp_path):
    keys = {"total_steps": 2, "batch_size": 16, "optimizer.warmup_steps": 0, "eval.num_samples": 64}
    keys |= {"eval.solver": "euler", "eval.num_steps": 2}
    arguments = [f"--config={ROOT}/configs/flow_2d.py", "--progress=none"]
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    compiled, read = run("train_jax.commands.train", *arguments, f"--workdir={tmp_path}/first")
    assert compiled > read
    compiled, read = run("train_jax.commands.train", *arguments, f"--workdir={tmp_path}/second")
    assert compiled == 0 and read > 0
    compiled, read = run("train_jax.commands.eval", f"--workdir={tmp_path}/second")
    assert compiled <= 2 < read  # beyond the run's own programs, it reads a checkpoint


def test_a_folder_of_the_users_own_and_zero_change_nothing(monkeypatch, tmp_path):
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("changed JAX's config"))
    enable(0)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path), raising=False)
    enable()
