"""A run of two processes on this machine."""

import signal

import pytest

from tests.together import coordinator, run_together
from tests.train_jax.runs import assert_same_run, command, environment, logged, metrics, steps_kept
from tests.train_jax.toy_task import toy_config
from train_jax import loop
from train_jax.core.errors import UserError
from train_jax.parallel import distributed

RUN = {"total_steps": 6, "eval_steps": 3, "checkpoint_steps": 3, "micro_batch": 4, "model.width": 16}
MESH = {"mesh.data": 2, "mesh.fsdp": 2}
SECONDS = 600  # it takes half a minute on an idle machine


def test_no_cluster(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(UserError, match="finds no cluster that JAX knows, .*: give --coordinator, --num_processes and"):
        distributed.start()


def test_arguments_reach_jax(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args: calls.append(args))
    distributed.start()
    distributed.start("10.0.0.1:1234", 2, 1)
    assert calls == [(), ("10.0.0.1:1234", 2, 1)]


def run_both(workdir, changes: dict) -> list[tuple[int, str]]:
    """Runs `train.py` in two processes of two devices each; returns status and output of both."""
    with coordinator() as address:
        place = ["--num_processes=2", f"--coordinator={address}", "--progress=plain"]
        commands = [command(workdir, RUN | MESH | changes, *place, f"--process_id={i}") for i in range(2)]
        return run_together(commands, workdir.parent / "outputs", SECONDS, cwd=workdir.parent, env=environment(2))


@pytest.mark.timeout(2 * SECONDS + 600)
@pytest.mark.slow
@pytest.mark.usefixtures("fast_runs")
def test_two_processes_train_save_and_restore_one_run(tmp_path):
    for run in ({"total_steps": 3}, {}):  # trained, then restored and trained on
        results = run_both(tmp_path / "two", run)
        assert [status for status, _ in results] == [0, 0], "\n".join(output for _, output in results)
    assert "step 6/6" in results[0][1] and "step 6/6" not in results[1][1]  # only one reports
    assert steps_kept(tmp_path / "two") == [6]
    one = {key.replace(".", "__"): value for key, value in RUN.items()}
    loop.fit(toy_config(**one, mesh__data=1), tmp_path / "one", "none")
    assert len(logged(tmp_path / "two")) == 6
    assert_same_run(tmp_path / "two", tmp_path / "one", 6, rtol=2e-4, atol=2e-6)


@pytest.mark.timeout(2 * SECONDS + 600)
@pytest.mark.slow
@pytest.mark.usefixtures("fast_runs")
def test_a_signal_to_one_process_stops_both(tmp_path):
    """They agree at a log step, so that neither waits for the other forever."""
    changes = {"total_steps": 40, "eval_steps": 40, "log_steps": 2, "data.signal_step": 9}
    results = run_both(tmp_path / "two", changes)
    assert [status for status, _ in results] == [128 + signal.SIGTERM] * 2
    (saved,) = steps_kept(tmp_path / "two")
    assert saved % 2 == 0 and f"interrupted: saved at step {saved};" in results[0][1]
    assert metrics(tmp_path / "two")[-1]["step"] == saved
