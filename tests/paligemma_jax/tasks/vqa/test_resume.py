"""A VQA run with LoRA dropout that is killed ends as one that was not."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from paligemma_jax.tasks.vqa import figures as vqa_figures
from tests.paligemma_jax.mini import ROOT, arguments, read_lines, train_main
from tests.train_jax.runs import assert_same_run, logged, steps_kept
from train_jax import loop

pytestmark = pytest.mark.slow
RUN = {
    "total_steps": 40,
    "log_steps": 1,
    "eval_steps": 40,
    "checkpoint_steps": 20,
    "adapter.dropout": 0.1,
    "optimizer.learning_rate": 0.01,
    "eval.controls": False,
    "eval.before": False,
    "eval.candidates": "",
    "data.max_bad_fraction": 0.5,
}
# Dies without a word when the batch of step 27 is read, once the checkpoint named first is there.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import train
from train_jax.config import command_line
from train_jax.data.pipeline import Pipeline

saved, read = Path(sys.argv[1]), Pipeline.read

def killing(self, step):
    if step == 27:
        deadline = time.monotonic() + 120
        while not saved.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, step)

Pipeline.read = killing
command_line.run(train.main, sys.argv[2:])
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_alike(fast_compilation):
    """What earlier tests compiled with all optimizations differs in the last bit from what a new process compiles."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:  # pictures take longer than the steps
        patch.setattr(loop, "plot_curves", lambda *paths: None)
        patch.setattr(vqa_figures, "save_answer_sheet", lambda *args, **options: None)
        yield


def run_until_killed(workdir, options) -> None:
    """`train.py` in a process of its own that SIGKILL ends after step 20 was saved."""
    command = [sys.executable, "-c", KILLED, str(workdir / "checkpoints/20")]
    command += arguments(workdir, options, "--progress=none")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert steps_kept(workdir) == [20]


def measured(workdir) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    lines = read_lines(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.fixture(scope="module", params=[True, False], ids=["cached", "uncached"])
def runs(request, mini_options, tmp_path_factory):
    """The options of a run, its workdir after 40 steps, and one in which it was killed after 20 were saved."""
    folder = tmp_path_factory.mktemp("runs")
    options = mini_options | RUN | {"cache_features": request.param}
    train_main(folder / "straight", options)
    run_until_killed(folder / "killed", options)
    return options, folder / "straight", folder / "killed"


def test_kill_9_changes_no_bit(runs, tmp_path):
    options, straight, killed = runs
    resumed = shutil.copytree(killed, tmp_path / "resumed")
    train_main(resumed, options)
    assert_same_run(resumed, straight, 40)
    assert sorted(logged(resumed)) == list(range(1, 41))
    assert measured(resumed) == measured(straight)
    assert (resumed / "predictions.jsonl").read_bytes() == (straight / "predictions.jsonl").read_bytes()


def test_eight_devices_resume_the_run_of_one(runs, tmp_path):
    options, straight, killed = runs
    resumed = shutil.copytree(killed, tmp_path / "resumed")
    train_main(resumed, options | {"mesh.data": 8})
    result, expected = logged(resumed), logged(straight)
    assert result.keys() == expected.keys()
    np.testing.assert_allclose(list(result.values()), list(expected.values()), rtol=1e-4)
    assert result != expected  # it did run elsewhere


def test_dropout_is_on(mini_options, tmp_path):
    """The losses above depend on the masks, so that equal losses mean equal masks."""
    short = mini_options | RUN | {"total_steps": 4, "eval_steps": 4, "checkpoint_steps": 4}
    losses = []
    for rate in (0.0, 0.1):
        train_main(tmp_path / str(rate), short | {"adapter.dropout": rate})
        losses.append(logged(tmp_path / str(rate)))
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)  # B is zero before the first update
    assert abs(losses[0][4] - losses[1][4]) > 1e-3
