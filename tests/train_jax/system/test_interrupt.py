"""An interrupted run has the same result as an uninterrupted one."""

import os
import random
import signal
import time

import pytest

from tests.train_jax.runs import assert_same_run, logged, start, steps_kept
from tests.train_jax.toy_task import Toy, toy_config
from train_jax import loop

pytestmark = pytest.mark.usefixtures("fast_runs")
RUN = {"total_steps": 40, "checkpoint_steps": 5, "eval_steps": 40, "ema_decay": 0.9, "mesh.data": 1}


def config(**changes):
    values = {key.replace(".", "__"): value for key, value in RUN.items()}
    return toy_config(**values | changes)


@pytest.fixture(scope="module")
def straight(fast_runs, tmp_path_factory):
    """A run of 40 steps without interruption, with dropout and a moving average."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    loop.fit(config(), workdir, "none")
    return workdir


def test_resuming_after_kill_9_is_exact(straight, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, RUN | {"data.delay": 0.01})
    try:
        deadline = time.monotonic() + 120
        while not (workdir / "checkpoints" / "20").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.5))  # between two saves or within one
    finally:
        process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 20 <= max(steps_kept(workdir)) < 40
    loop.fit(config(), workdir, "none")
    assert_same_run(workdir, straight, 40)


def test_sigterm_saves_and_the_same_command_resumes(straight, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, RUN | {"data.signal_step": 12})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    (saved,) = steps_kept(workdir)
    assert 0 < saved <= 13  # rows are prefetched
    assert f"interrupted: saved at step {saved}; run the same command to resume." in output
    assert "Traceback" not in output
    assert max(logged(workdir)) == saved
    loop.fit(config(), workdir, "none")
    assert_same_run(workdir, straight, 40)


@pytest.mark.parametrize("devices", [1, 8])
def test_ctrl_c_and_a_resume_on_other_devices(straight, tmp_path, devices):
    with pytest.raises(SystemExit) as stopped:
        loop.fit(config(data__signal_step=17, data__signal_number=int(signal.SIGINT)), tmp_path, "none")
    assert stopped.value.code == 128 + signal.SIGINT
    (saved,) = steps_kept(tmp_path)
    assert 0 < saved <= 18
    loop.fit(config(mesh__data=devices), tmp_path, "none")
    assert_same_run(tmp_path, straight, 40, **({} if devices == 1 else {"rtol": 1e-4, "atol": 1e-6}))


def test_signal_at_the_last_step_leaves_the_evaluation_to_the_next_run(tmp_path, capsys):
    run = {"total_steps": 2, "eval_steps": 2, "mesh__data": 1, "data__threads": 0}
    with pytest.raises(SystemExit):
        loop.fit(toy_config(**run, data__signal_step=1), tmp_path, "none")
    assert steps_kept(tmp_path) == [2] and not (tmp_path / "eval.json").exists()
    before = logged(tmp_path)
    assert loop.fit(toy_config(**run), tmp_path, "none")["step"] == 2
    assert logged(tmp_path) == before


def test_a_signal_during_the_last_evaluation_stops_the_run(tmp_path, monkeypatch):
    run = {"total_steps": 2, "eval_steps": 2, "mesh__data": 1}
    validate = Toy.validate

    def validate_and_be_asked_to_end(self, model):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, model)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Toy, "validate", validate_and_be_asked_to_end)
        loop.fit(toy_config(**run), tmp_path, "none")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert steps_kept(tmp_path) == [2] and not (tmp_path / "eval.json").exists()
    assert loop.fit(toy_config(**run), tmp_path, "none")["step"] == 2


def test_signal_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    loop.fit(toy_config(total_steps=1, mesh__data=1), tmp_path, "none")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
