"""Non-finite updates and bad rows during a run: messages, checkpoints and exit status."""

import json

import numpy as np
import pytest

import train
from tests.train_jax.runs import arguments, fails, logged, metrics, steps_kept, stored
from tests.train_jax.toy_task import toy_config
from train_jax import loop
from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.step.train_state import LossScale

pytestmark = pytest.mark.usefixtures("fast_runs")


def fit(workdir, **changes):
    return loop.fit(toy_config(**{"mesh__data": 1, "total_steps": 12, **changes}), workdir, "none")


def test_one_fault_stops_the_run(tmp_path, capsys):
    """A NaN in step 5 is detected at the log of step 8, before step 8 is saved."""
    workdir = tmp_path / "run"
    run = {"mesh.data": 1, "total_steps": 12, "log_steps": 8, "data.nan_steps": "(5,)"}
    status, line = fails(capsys, workdir, run)
    assert status == 1
    file = workdir / "bad_batch_5.npz"
    assert line == (
        "train.py: error: the loss or its gradient was non-finite in 1 update(s) in a row from step 5 on "
        f"(max_bad_steps=1); the checkpoint of step 4 is kept and the batch is in {file}: inspect it, or lower "
        "optimizer.learning_rate or set optimizer.grad_clip_norm in another --workdir."
    )
    assert steps_kept(workdir) == [4]
    with np.load(file, allow_pickle=False) as batch:
        assert {name: rows.shape for name, rows in batch.items()} == {
            "x": (1, 8, 8), "y": (1, 8), "index": (1, 8), "weight": (1, 8)
        }  # fmt: skip
        assert np.isnan(batch["x"]).sum() == 1
    assert metrics(workdir)[-1]["step"] == 8 and metrics(workdir)[-1]["bad_steps"] == 1
    # The same command resumes from the checkpoint and stops at the same step.
    assert fails(capsys, workdir, run) == (1, line)
    assert steps_kept(workdir) == [4]


def test_a_fault_before_any_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"from step 0 on .* no checkpoint was saved yet and the batch is in"):
        fit(tmp_path, data__nan_steps=(0,))
    assert steps_kept(tmp_path) == []


def test_fewer_faults_than_max_bad_steps_do_not_stop_the_run(tmp_path, capsys):
    fit(tmp_path / "bad", data__nan_steps=(5, 6), max_bad_steps=3)
    printed = capsys.readouterr().out
    assert "1 update(s) up to step 6 had a non-finite loss or gradient and were skipped" in printed
    assert "1 update(s) up to step 7 had" in printed
    records = {record["step"]: record for record in metrics(tmp_path / "bad") if "loss" in record}
    assert [step for step, record in records.items() if record["loss"] is None] == [6, 7]
    assert "loss" in records[6]["nonfinite"]
    assert [record.get("bad_steps") for record in records.values()] == [None] * 5 + [1] + [2] * 6
    fit(tmp_path / "good")
    good = logged(tmp_path / "good")
    assert [records[step]["loss"] for step in range(1, 6)] == [good[step] for step in range(1, 6)]
    assert records[8]["loss"] != good[8]  # two updates fewer


def test_too_many_faults_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="non-finite in 3 update.* from step 5 on .*max_bad_steps=3.*step 4 is kept"):
        fit(tmp_path, data__nan_steps=(5, 6, 7), max_bad_steps=3)


def test_no_checkpoint_is_saved_after_a_bad_step(tmp_path, capsys):
    run = {"data__nan_steps": (7,), "max_bad_steps": 3, "eval_steps": 12}
    fit(tmp_path, **run, total_steps=9)
    assert "step 8 is not saved: the last 1 update(s) were non-finite" in capsys.readouterr().out
    assert steps_kept(tmp_path) == [9]


def test_faults_are_reported_once_across_a_resume(tmp_path, capsys):
    run = {"data__nan_steps": (2,), "max_bad_steps": 2}
    fit(tmp_path, **run, total_steps=4)
    assert "1 update(s) up to step 3" in capsys.readouterr().out
    fit(tmp_path, **run)
    assert "update(s)" not in capsys.readouterr().out
    assert metrics(tmp_path)[-2]["bad_steps"] == 1


def test_float16_overflow_through_a_run_and_its_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "INTERVAL", 5)  # steps 3 to 7 are good: doubled again after step 8
    run = {"compute_dtype": "float16", "data__spike_steps": (2,), "eval_steps": 12}
    fit(tmp_path / "straight", **run)
    scales = logged(tmp_path / "straight", "loss_scale")
    halved = 2.0**14
    assert scales == {step: 2 * halved if step < 3 or step >= 8 else halved for step in scales}
    assert set(logged(tmp_path / "straight", "loss_scale_skips").items()) >= {(2, 0), (3, 1), (12, 1)}
    assert all("bad_steps" not in record for record in metrics(tmp_path / "straight"))
    fit(tmp_path / "resumed", **run, total_steps=4)
    saved = stored(tmp_path / "resumed", 4)
    assert saved["opt_state:loss_scale/value"] == halved and saved["opt_state:loss_scale/good_steps"] == 1
    fit(tmp_path / "resumed", **run)
    assert logged(tmp_path / "resumed", "loss_scale") == scales
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def test_bad_rows_keep_their_place_in_the_batch(tmp_path):
    fit(tmp_path / "bad", data__corrupt_steps=(3, 9), data__max_bad_fraction=0.5, data__threads=0)
    fit(tmp_path / "good")
    bad, good = logged(tmp_path / "bad"), logged(tmp_path / "good")
    assert [bad[step] == good[step] for step in range(1, 6)] == [True, True, True, False, False]
    counts = {step: 1 if step < 10 else 2 for step in range(4, 13)}
    assert logged(tmp_path / "bad", "bad_rows") == counts
    # For any amount of prefetching.
    fit(tmp_path / "ahead", data__corrupt_steps=(3, 9), data__max_bad_fraction=0.5, data__threads=3)
    assert logged(tmp_path / "ahead", "bad_rows") == counts
    # The batch of step 3 equals that of the good run except for one weight.
    assert len(set(bad) ^ set(good)) == 0


def test_a_bad_row_stops_the_run_with_on_error_raise(tmp_path, capsys):
    run = {"mesh.data": 1, "data.on_error": "raise", "data.corrupt_steps": "(2,)"}
    status, line = fails(capsys, tmp_path / "run", run)
    assert status == 2
    assert line.startswith("train.py: error: row") and line.endswith(".png is cut off")


def test_too_many_bad_rows_stop_the_run(tmp_path, capsys):
    run = {"mesh.data": 1, "data.examples": 16, "data.corrupt_steps": "(0,)"}
    status, line = fails(capsys, tmp_path / "run", run)
    assert status == 2
    assert "rows read were bad" in line and "expected at most 1.0%" in line


@pytest.mark.slow
def test_bad_rows_of_all_workers_are_counted_together(tmp_path, capsys):
    """12 of 96 rows are bad; each of two workers reads about half of them, and this process none."""
    run = {"data__workers": 2, "data__corrupt_steps": tuple(range(12)), "log_steps": 4, "eval_steps": 12}
    with pytest.raises(UserError, match=r"12 of 96 rows read were bad \(12.5%; first: row\d+.png, row\d+.png, "):
        fit(tmp_path, **run, data__max_bad_fraction=0.1)
    assert logged(tmp_path, "bad_rows") == {4: 4, 8: 8, 12: 12}


def test_frozen_parameters_do_not_change_and_are_not_saved(tmp_path, monkeypatch):
    """The model evaluated after training has the same frozen parameters, bit for bit."""
    seen = []
    from tests.train_jax.toy_task import Toy
    from train_jax.core import param_tree

    def evaluate(self, model, workdir, split=None, control_results=None):
        seen.append(param_tree.flatten(model))
        return {}

    monkeypatch.setattr(Toy, "evaluate", evaluate)
    fit(tmp_path, total_steps=4)
    initial = param_tree.flatten(Toy(toy_config(), None).init())
    same = {path for path, leaf in seen[0].items() if (np.asarray(leaf) == np.asarray(initial[path])).all()}
    assert same == {"tower/kernel", "tower/bias"}
    saved = {name.removeprefix("params:") for name in stored(tmp_path, 4) if name.startswith("params:")}
    assert saved == set(initial) - same
    assert not any("tower" in name for name in stored(tmp_path, 4))


def test_success_prints_where_the_results_are(tmp_path, capsys):
    workdir = tmp_path / "run"
    command_line.run(train.main, arguments(workdir, {"mesh.data": 1, "total_steps": 2}, "--progress=none"))
    printed = capsys.readouterr().out
    assert f"{workdir}: " in printed and "peak memory" in printed and "eval.json" in printed
    assert json.loads((workdir / "eval.json").read_text())["step"] == 2
