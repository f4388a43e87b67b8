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


def test_a_second_start_compiles_nothing(run):
    image = ROOT / "docs/sample_data/images/0001.png"
    arguments = ["--model=tiny", f"--image={image}", "--prompt=caption en", "--max_new_tokens=2"]
    compiled, read = run("paligemma_jax.commands.predict", *arguments)
    assert compiled > read
    compiled, read = run("paligemma_jax.commands.predict", *arguments)
    assert compiled == 0 and read > 0


def test_a_folder_of_the_users_own_and_zero_change_nothing(monkeypatch, tmp_path):
    enable(0)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("changed JAX's config"))
        enable()
    finally:
        monkeypatch.undo()
        jax.config.update("jax_compilation_cache_dir", None)
