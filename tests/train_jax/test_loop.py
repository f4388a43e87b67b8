"""Workdirs, durations, evaluations and checkpoints of a run."""

import json
import math
import shutil
import time

import numpy as np
import pytest

from tests.train_jax.runs import assert_same_run, fails, logged, metrics, steps_kept, stored
from tests.train_jax.toy_task import Rows, Toy, toy_config
from train_jax import loop
from train_jax.config.base import from_json
from train_jax.core.errors import UserError
from train_jax.report import plots

pytestmark = pytest.mark.usefixtures("fast_runs")


def config(**changes):
    return toy_config(**{"mesh__data": 1, **changes})


def fit(workdir, **changes):
    return loop.fit(config(**changes), workdir, "none")


def eval_steps(workdir, name="loss"):
    """Returns the steps at which the run was evaluated."""
    return [record["step"] for record in metrics(workdir) if f"eval/{name}" in record]


def trained_steps(workdir):
    return [record["step"] for record in metrics(workdir) if "grad_norm" in record]


@pytest.fixture(scope="module")
def finished(fast_runs, tmp_path_factory):
    """The workdir of a run of 8 steps, and the results of `fit`."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", plots.plot_curves)
        return workdir, fit(workdir)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's workdir."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


# The workdir.


def test_the_files_of_a_run(finished):
    workdir, results = finished
    assert {file.name for file in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "eval.json", "checkpoints", "tensorboard", "curves.png"
    }  # fmt: skip
    assert from_json((workdir / "config.json").read_text()) == config()
    records = metrics(workdir)
    assert all(isinstance(record["step"], int) for record in records)
    assert trained_steps(workdir) == list(range(1, 9)) and eval_steps(workdir) == [4, 8]
    assert {"loss", "error", "grad_norm", "learning_rate", "data_wait_seconds"} <= records[0].keys()
    assert json.loads((workdir / "eval.json").read_text()) == results
    assert results["step"] == 8 and results["seconds"] > 0 and results["peak_memory_bytes"] > 2**26
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())


def test_the_model_learns(tmp_path):
    """From weighted examples; the best constant prediction has a loss of about 0.5."""
    run = {"total_steps": 100, "eval_steps": 100, "log_steps": 100, "model__dropout": 0.0}
    assert fit(tmp_path, **run)["loss"] < 0.25


def test_a_complete_run_is_not_trained_again(run, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    results = fit(run)
    assert f"{run} is complete: 8 steps trained and evaluated, see {run / 'eval.json'}." in capsys.readouterr().out
    assert results == json.loads((run / "eval.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before


def test_a_run_killed_before_its_evaluation_only_evaluates(run):
    (run / "eval.json").unlink()
    before = (run / "metrics.jsonl").read_text()
    assert fit(run)["step"] == 8
    assert (run / "metrics.jsonl").read_text() == before and (run / "eval.json").exists()


def test_a_changed_config_is_refused_with_the_difference(run):
    with pytest.raises(UserError) as error:
        fit(run, optimizer__learning_rate=0.02, model__width=16, mesh__data=2)
    assert "optimizer.learning_rate: 0.01 -> 0.02" in str(error.value)
    assert "model.width: 8 -> 16" in str(error.value)
    assert "mesh" not in str(error.value)
    assert from_json((run / "config.json").read_text()) == config()


@pytest.fixture
def nothing_prepared(monkeypatch):
    """Fails the test if data or a model are prepared."""
    for name in ("train_source", "init"):
        monkeypatch.setattr(Toy, name, lambda self: pytest.fail("something was prepared"))


@pytest.mark.usefixtures("nothing_prepared")
def test_a_used_workdir_is_checked_before_data_are_prepared(run, capsys):
    with pytest.raises(UserError, match="another config .model.width: 8 -> 16"):
        fit(run, model__width=16)
    with pytest.raises(UserError, match="holds a run of 8 steps .* asks for 6"):
        fit(run, total_steps=None, total_epochs=0.05)  # of 1000 examples, a number that the checkpoint stores


def test_the_data_of_a_complete_run_are_checked_without_a_model(run, monkeypatch, capsys):
    """Both the training data and, if the task has a fingerprint for them, the evaluation data."""
    monkeypatch.setattr(Toy, "init", lambda self: pytest.fail("a model was made"))
    assert fit(run)["step"] == 8 and "is complete" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    with monkeypatch.context() as changed:
        changed.setattr(Rows, "fingerprint", property(lambda self: "others", lambda self, value: None), raising=False)
        with pytest.raises(UserError, match="the training data is not that of the checkpoint .*'others'") as error:
            fit(run)
    assert error.value.exit_status == 2 and "is complete" not in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before


def test_the_evaluation_data_of_a_complete_run_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "reported_data", lambda self: "held out", raising=False)
    assert fit(tmp_path)["data"] == "held out" and fit(tmp_path)["step"] == 8
    monkeypatch.setattr(Toy, "reported_data", lambda self: "others")
    capsys.readouterr()
    with pytest.raises(UserError, match="have changed .fingerprint held out, now others"):
        fit(tmp_path)
    assert "is complete" not in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_prepared")
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"name": "adamm"}, "config.optimizer.name='adamm', expected one of adamw, adam, sgd, "),
        ({"schedule": "step"}, "config.optimizer.schedule='step', expected one of constant, linear, cosine, rsqrt"),
        ({"grad_clip_norm": -1.0}, "config.optimizer.grad_clip_norm=-1.0, expected a number above 0"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay=0.1 has no meaning for optimizer 'adam'"),
        ({"rates": (("tower/.*", 2.0),)}, "rule: 'tower/.*' matches none of 2 paths .nearest are head"),
        ({"weight_decay": 0.1, "weight_decay_mask": "tower/.*"}, "weight_decay_mask .* matches none of 2 paths"),
    ],
)
def test_optimizer_errors_are_raised_before_data_are_prepared(tmp_path, monkeypatch, changes, sentence):
    """Including patterns, for a task that knows its parameter paths early."""
    monkeypatch.setattr(Toy, "trainable_paths", lambda task: ["head/kernel", "head/bias"], raising=False)
    with pytest.raises(UserError, match=sentence):
        fit(tmp_path / "run", **{f"optimizer__{key}": value for key, value in changes.items()})
    assert not (tmp_path / "run").exists()


def test_resume_safe_keys_may_change(run, capsys):
    """A run resumes with another mesh, micro-batch and intervals and has the same losses."""
    fit(
        run, total_steps=12, mesh__data=2, micro_batch=4, log_steps=2, eval_steps=3, checkpoint_steps=5, data__threads=1
    )
    printed = capsys.readouterr().out
    assert "micro_batch: None -> 4 (does not change the mathematics)" in printed
    assert "mesh.data: 1 -> 2 (does not change the mathematics)" in printed
    assert "the run is extended from 8 to 12 steps (total_steps=8 -> total_steps=12)" in printed
    fit(run.parent / "straight", total_steps=12)
    straight, resumed = logged(run.parent / "straight"), logged(run)
    assert sorted(resumed) == [*range(1, 9), 10, 12] and eval_steps(run) == [4, 8, 9, 12]
    for step in (10, 12):
        assert resumed[step] == pytest.approx((straight[step - 1] + straight[step]) / 2, rel=1e-5)
    assert from_json((run / "config.json").read_text()).total_steps == 12


def test_extending_a_run_removes_its_results(run, monkeypatch):
    """If killed after its last step, it must not count as complete with the old results."""
    monkeypatch.setattr(loop.Trainer, "finish", lambda *args: {})
    fit(run, total_steps=12)
    assert not (run / "eval.json").exists()


def test_a_shorter_run_is_refused(run):
    with pytest.raises(UserError, match="holds a run of 8 steps .* and total_steps=4 asks for 4, expected as many"):
        fit(run, total_steps=4)


def test_other_data_is_refused(run, monkeypatch):
    """The same config with changed files."""
    from tests.train_jax.toy_task import Rows

    monkeypatch.setattr(Rows, "__len__", lambda self: 999)
    with pytest.raises(UserError, match=r"training data is not that of the checkpoint in .*'examples': \(1000, 999\)"):
        fit(run, total_steps=12)
    assert from_json((run / "config.json").read_text()).total_steps == 8


def test_checkpoints_without_their_config_are_refused(run):
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        fit(run)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.total_steps=0 trains nothing, expected a number above 0"):
        fit(tmp_path, total_steps=0)


# Durations.


def test_durations_in_epochs_percent_and_examples(tmp_path):
    fit(
        tmp_path,
        data__examples=64,
        total_steps=None,
        total_epochs=2.5,  # of 8 batches
        eval_steps=None,
        eval_epochs=1.0,
        log_steps=None,
        log_examples=40,
        checkpoint_steps=None,
        checkpoint_percent=0.3,
    )
    assert trained_steps(tmp_path) == [5, 10, 15, 20]
    assert eval_steps(tmp_path) == [8, 16, 20]


def test_schedule_and_warm_up(tmp_path):
    fit(tmp_path, optimizer__schedule="linear", optimizer__warmup_percent=0.25, eval_steps=8)
    rates = [0.0, 0.005] + [0.01 * (1 - t / 6) for t in range(6)]
    np.testing.assert_allclose(list(logged(tmp_path, "learning_rate").values()), rates, rtol=1e-6)


# Evaluations.


def test_early_stopping_loads_the_best_checkpoint(tmp_path, capsys):
    run = {"total_steps": 20, "eval_steps": 2, "checkpoint_steps": 1, "patience": 2}
    run |= {"best_metric": "score", "load_best_at_end": True, "scores": (0.5, 0.9, 0.8, 0.9, 0.99)}
    results = fit(tmp_path, **run)
    assert eval_steps(tmp_path) == [2, 4, 6, 8] and max(trained_steps(tmp_path)) == 8
    assert "score has not improved in 2 evaluations: stopping at step 8." in capsys.readouterr().out
    assert results["step"] == 4 and steps_kept(tmp_path) == [4, 8]
    assert results["loss"] == pytest.approx(
        next(r for r in metrics(tmp_path) if r["step"] == 4 and "eval/loss" in r)["eval/loss"]
    )
    assert fit(tmp_path, **run) == json.loads((tmp_path / "eval.json").read_text())
    complete = (
        f"{tmp_path} is complete: the run stopped early at step 8, when 2 evaluations in a row had brought no better "
        f"score (patience=2), see {tmp_path / 'eval.json'}; to train on, raise config.patience or set it to None.\n"
    )
    assert capsys.readouterr().out == complete
    # Extending the run does not resume it.
    assert fit(tmp_path, **run | {"total_steps": 30}) == results
    assert capsys.readouterr().out == complete
    # With more patience it resumes and stops later.
    results = fit(tmp_path, **run | {"patience": 3, "scores": (0.95, 0.7)})
    assert results["step"] == 10 and steps_kept(tmp_path) == [10, 16]


def test_an_early_stopped_run_without_results_is_only_evaluated(tmp_path, capsys):
    run = {"total_steps": 20, "eval_steps": 2, "patience": 1, "best_metric": "score", "scores": (0.9, 0.5)}
    fit(tmp_path, **run)
    (tmp_path / "eval.json").unlink()
    capsys.readouterr()
    assert fit(tmp_path, **run | {"total_steps": 30})["step"] == 4
    printed = capsys.readouterr().out
    assert printed.startswith(
        "the run stopped early at step 4, when 1 evaluations in a row had brought no better score"
    )
    assert "only its evaluation is left; to train on, raise config.patience" in printed and "extended" not in printed
    assert max(trained_steps(tmp_path)) == 4


def test_a_resume_continues_early_stopping(tmp_path):
    run = {"eval_steps": 2, "patience": 2, "best_metric": "score", "load_best_at_end": True}
    fit(tmp_path, **run, total_steps=6, scores=(0.5, 0.9, 0.8))
    results = fit(tmp_path, **run, total_steps=20, scores=(0.85, 0.95))
    assert eval_steps(tmp_path) == [2, 4, 6, 8] and results["step"] == 4


def test_best_mode_min(tmp_path):
    results = fit(
        tmp_path, eval_steps=2, best_metric="score", best_mode="min", load_best_at_end=True, scores=(3.0, 1.0, 2.0, 1.5)
    )
    assert results["step"] == 4 and steps_kept(tmp_path) == [4, 8]


def test_a_nan_is_never_best(tmp_path):
    nan = math.nan
    run = {"eval_steps": 2, "patience": 2, "best_metric": "score", "load_best_at_end": True}
    results = fit(tmp_path, **run, scores=(nan, 0.1, nan, 0.2))
    assert results["step"] == 8 and eval_steps(tmp_path) == [2, 4, 6, 8]


def test_an_unknown_best_metric(tmp_path):
    """If the task does not list its metrics, the first evaluation detects it."""
    with pytest.raises(UserError, match=r"best_metric='accuracy' is not measured .*, expected one of loss: change it"):
        fit(tmp_path, best_metric="accuracy")
    assert eval_steps(tmp_path) == [4]


@pytest.mark.usefixtures("nothing_prepared")
def test_an_unknown_best_metric_is_refused_early(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "validation_metrics", ("loss", "score"), raising=False)
    assert fails(capsys, tmp_path / "run", {"mesh.data": 1, "best_metric": "scor"}) == (
        2,
        "train.py: error: config.best_metric='scor' is not measured during training, expected one of loss, "
        "score: change it; did you mean 'score'?",
    )
    assert not (tmp_path / "run").exists()


def test_the_moving_average_is_evaluated_and_saved(tmp_path):
    """After one update the average equals the parameters; later it lags behind them."""
    fit(tmp_path, total_steps=1, ema_decay=0.99)
    first = stored(tmp_path, 1)
    results = fit(tmp_path, total_steps=6, ema_decay=0.99)
    last = stored(tmp_path, 6)
    for path in (name.removeprefix("ema:") for name in last if name.startswith("ema:")):
        np.testing.assert_allclose(first[f"ema:{path}"], first[f"params:{path}"], rtol=1e-6)
        assert not np.allclose(last[f"ema:{path}"], last[f"params:{path}"], rtol=1e-3)
    final = [record for record in metrics(tmp_path) if "eval/loss" in record][-1]
    assert results["loss"] == final["eval/loss"]
    assert loop.evaluate(config(total_steps=6, ema_decay=0.99), tmp_path)["loss"] == results["loss"]


# evaluate()


@pytest.fixture(scope="module")
def two_checkpoints(fast_runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    changes = {"best_metric": "score", "scores": (0.9, 0.1)}
    fit(workdir, **changes)
    return config(**changes), workdir


@pytest.mark.parametrize(("which", "step"), [("best", 4), ("latest", 8), ("4", 4), (8, 8)])
def test_evaluate_a_checkpoint(two_checkpoints, which, step):
    run_config, workdir = two_checkpoints
    results = loop.evaluate(run_config, workdir, split="tune", checkpoint=which)
    measured = {record["step"]: record["eval/loss"] for record in metrics(workdir) if "eval/loss" in record}
    assert results["step"] == step and results["loss"] == pytest.approx(measured[step], rel=1e-6)
    assert json.loads((workdir / "eval-tune.json").read_text()) == json.loads(json.dumps(results))
    assert results["split"] == "tune"


def test_evaluate_a_missing_checkpoint(two_checkpoints, tmp_path, monkeypatch):
    """It is refused before the model is loaded."""
    monkeypatch.setattr(Toy, "init", lambda self: pytest.fail("the model was read"))
    run_config, workdir = two_checkpoints
    with pytest.raises(UserError, match="checkpoint '5' not found .* choose 'best', 'latest' or a step of 4, 8"):
        loop.evaluate(run_config, workdir, checkpoint="5")
    with pytest.raises(UserError, match="no checkpoints in .*which does not exist"):
        loop.evaluate(run_config, tmp_path / "none", checkpoint="latest")


def test_evaluate_the_model_before_training(tmp_path):
    results = loop.evaluate(config(), tmp_path / "base")
    assert results["step"] == 0
    fit(tmp_path / "run", total_steps=1, optimizer__learning_rate=0.0)
    assert results["loss"] == json.loads((tmp_path / "run" / "eval.json").read_text())["loss"]
    assert json.loads((tmp_path / "base" / "eval.json").read_text()) == results


def test_a_run_without_trainable_parameters_is_an_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "trainable", lambda self: None)
    untouched = loop.evaluate(config(), tmp_path / "base")
    results = fit(tmp_path / "run")
    assert results["loss"] == untouched["loss"] and results["trainable_parameters"] == results["step"] == 0
    assert json.loads((tmp_path / "run/eval.json").read_text())["finished"]
    assert from_json((tmp_path / "run/config.json").read_text()).total_steps == 8
    assert not (tmp_path / "run/checkpoints").exists()
    capsys.readouterr()
    assert fit(tmp_path / "run") == results
    assert "run is complete: nothing trains, see" in capsys.readouterr().out
    with pytest.raises(UserError, match="another config .*seed: 0 -> 1"):
        fit(tmp_path / "run", seed=1)


def test_evaluate_on_other_devices(two_checkpoints):
    run_config, workdir = two_checkpoints
    expected = loop.evaluate(run_config, workdir, split="one")["loss"]
    with run_config.unlocked():
        run_config.mesh.data, run_config.mesh.fsdp, run_config.mesh.tensor = 2, 2, 2
    try:
        assert loop.evaluate(run_config, workdir, split="eight")["loss"] == pytest.approx(expected, rel=1e-5)
    finally:
        with run_config.unlocked():
            run_config.mesh.data, run_config.mesh.fsdp, run_config.mesh.tensor = 1, 1, 1


def test_print_batch_shows_the_first_batch():
    text = loop.describe_batch(config(micro_batch=4))
    assert text == loop.describe_batch(config())  # the rows of a batch do not depend on the micro-batch
    assert text.startswith("8 rows: ") and len(set(text.split()[2:])) == 8
    assert text != loop.describe_batch(config(seed=1))


def test_control_runs_have_their_own_workdirs(tmp_path, monkeypatch):
    def control_runs(self):
        return {} if self.config.seed else {"blind": config(seed=1, total_steps=2)}

    def evaluate(self, model, workdir, split=None, control_results=None):
        return {"seed": self.config.seed, "control_results": control_results}

    monkeypatch.setattr(Toy, "control_runs", control_runs, raising=False)
    monkeypatch.setattr(Toy, "evaluate", evaluate)
    results = fit(tmp_path, total_steps=2)
    assert results["seed"] == 0 and results["control_results"]["blind"]["seed"] == 1
    assert from_json((tmp_path / "blind" / "config.json").read_text()).seed == 1
    # The time of a control run that an earlier process trained counts too.
    (tmp_path / "eval.json").unlink()
    blind = tmp_path / "blind" / "eval.json"
    blind.write_text(json.dumps(json.loads(blind.read_text()) | {"seconds": 1000.0}))
    assert 1000 < fit(tmp_path, total_steps=2)["seconds"] < 1100


def test_seconds_count_from_began_and_across_a_resume(tmp_path):
    """`began` is 100 s before the first call and 50 s before the second; every second counts once."""
    before = time.perf_counter()
    first = loop.fit(config(total_steps=4), tmp_path, "none", before - 100)["seconds"]
    assert 100 < first < 100 + time.perf_counter() - before
    between = time.perf_counter()
    results = loop.fit(config(total_steps=8), tmp_path, "none", between - 50)
    assert 150 < results["seconds"] < 150 + time.perf_counter() - before
    assert results["seconds"] == json.loads((tmp_path / "eval.json").read_text())["seconds"]


@pytest.mark.slow
def test_workers_and_threads_read_the_same_batches(tmp_path):
    """Including a bad row."""
    run = {"data__corrupt_steps": (2,), "data__max_bad_fraction": 0.5}
    fit(tmp_path / "workers", data__workers=2, **run)
    fit(tmp_path / "threads", **run)
    assert_same_run(tmp_path / "workers", tmp_path / "threads", 8)
