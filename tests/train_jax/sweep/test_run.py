"""Sweeps of the toy task: which runs are trained, skipped, resumed or refused, and which files are written."""

import gc
import json
import re
import shutil
import signal

import jax
import pytest

import eval as eval_script
import train
from tests.train_jax.runs import arguments, assert_same_run, fails, start
from tests.train_jax.toy_task import Rows, Toy, toy_config
from train_jax import loop
from train_jax.config import command_line
from train_jax.config.base import from_json
from train_jax.core.errors import RunStopped, UserError
from train_jax.sweep import run as sweep

pytestmark = pytest.mark.usefixtures("fast_runs")

RATES = (
    ("slow-0", {"optimizer.learning_rate": 0.001, "seed": 0}),
    ("slow-1", {"optimizer.learning_rate": 0.001, "seed": 1}),
    ("fast", {"optimizer.learning_rate": 0.01}),
)


def config(runs=RATES, **changes):
    return toy_config(**{"mesh__data": 1, "sweep__runs": runs, "sweep__x": "optimizer.learning_rate", **changes})


def fit(workdir, runs=RATES, **changes):
    return sweep.fit(config(runs, **changes), workdir, "none")


@pytest.fixture(scope="module")
def finished(fast_runs, tmp_path_factory):
    """The workdir of a complete sweep of three runs, and the result of `fit`."""
    workdir = tmp_path_factory.mktemp("finished") / "sweep"
    return workdir, fit(workdir)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the complete sweep."""
    shutil.copytree(finished[0], tmp_path / "sweep")
    return tmp_path / "sweep"


def modification_times(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def record_trained(monkeypatch) -> list[str]:
    """Returns a list to which the name of each run that is trained from now on is appended."""
    names, original = [], loop.fit
    monkeypatch.setattr(
        loop, "fit", lambda config, workdir, *more: names.append(workdir.name) or original(config, workdir, *more)
    )
    return names


# Results of a sweep.


def test_a_run_of_a_sweep_equals_a_single_run_of_its_config(finished, tmp_path):
    workdir, _ = finished
    loop.fit(toy_config(mesh__data=1, optimizer__learning_rate=0.001, seed=1), tmp_path / "alone", "none")
    assert_same_run(workdir / "slow-1", tmp_path / "alone", step=8)
    stored = from_json((workdir / "slow-1" / "config.json").read_text())
    assert (stored.seed, stored.optimizer.learning_rate, stored.sweep.runs, stored.sweep.x) == (1, 0.001, (), None)


def test_the_summary_has_the_results_of_the_runs(finished):
    workdir, summary = finished
    assert json.loads((workdir / "sweep.json").read_text()) == summary
    results = [json.loads((workdir / name / "eval.json").read_text()) for name, _ in RATES]
    assert summary["metric"] == "loss" and [run["value"] for run in summary["runs"]] == [r["loss"] for r in results]
    assert [run["x"] for run in summary["runs"]] == [0.001, 0.001, 0.01]
    assert all(run["complete"] and run["step"] == 8 for run in summary["runs"])
    assert {run["trainable_parameters"] for run in summary["runs"]} == {2 * 8 * 8 + 2 * 8 + 8 + 1}
    slow, fast = summary["groups"]
    assert slow["runs"] == ["slow-0", "slow-1"] and fast["runs"] == ["fast"]
    assert slow["mean"] == pytest.approx((results[0]["loss"] + results[1]["loss"]) / 2)
    assert slow["std"] == pytest.approx(abs(results[0]["loss"] - results[1]["loss"]) / 2**0.5)
    assert fast["std"] is None


def test_the_folder_contains_table_plot_and_config(finished):
    workdir, _ = finished
    assert {file.name for file in workdir.iterdir() if file.is_file()} == {
        "config.json", "sweep.json", "sweep.md", "sweep.png", "eval.json"
    }  # fmt: skip
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert from_json((workdir / "config.json").read_text()) == config()


# The same command again.


def test_a_complete_sweep_is_not_trained_again(folder, monkeypatch, finished):
    before = modification_times(folder / "fast") | modification_times(folder / "slow-0")
    monkeypatch.setattr(Toy, "init", lambda self: pytest.fail("a run was trained again"))
    assert fit(folder) == finished[1]
    assert modification_times(folder / "fast") | modification_times(folder / "slow-0") == before


def test_a_complete_run_is_refused_if_the_data_has_changed(folder, monkeypatch):
    before = modification_times(folder)
    monkeypatch.setattr(Rows, "fingerprint", property(lambda self: "others", lambda self, value: None), raising=False)
    with pytest.raises(UserError, match="slow-0: the training data is not that of the checkpoint"):
        fit(folder)
    assert modification_times(folder) == before


def test_a_new_run_is_added_to_a_complete_sweep(folder, monkeypatch):
    names = record_trained(monkeypatch)
    summary = fit(folder, (*RATES, ("faster", {"optimizer.learning_rate": 0.02})))
    assert names == ["faster"] and [run["name"] for run in summary["runs"]] == ["slow-0", "slow-1", "fast", "faster"]


def test_a_changed_override_is_refused_before_anything_is_trained(folder, monkeypatch):
    names, before = record_trained(monkeypatch), modification_times(folder)
    changed = (("new", {}), *RATES[:2], ("fast", {"optimizer.learning_rate": 0.02}))
    with pytest.raises(UserError) as error:
        fit(folder, changed)
    assert f"{folder / 'fast'}: the workdir holds a run with another config" in str(error.value)
    assert "optimizer.learning_rate: 0.01 -> 0.02" in str(error.value)
    assert names == [] and modification_times(folder) == before


def test_a_killed_sweep_resumes(tmp_path, finished):
    """kill -9 in the second run, after its checkpoint of step 4."""
    workdir = tmp_path / "sweep"
    kill = {"data.signal_step": 6, "data.signal_number": int(signal.SIGKILL)}
    runs = tuple((name, overrides | (kill if name == "slow-1" else {})) for name, overrides in RATES)
    settings = {"mesh.data": 1, "sweep.runs": repr(runs), "sweep.x": "optimizer.learning_rate"}
    process = start(workdir, settings, "--progress=none")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    states = [(run["name"], run["complete"]) for run in json.loads((workdir / "sweep.json").read_text())["runs"]]
    assert states == [("slow-0", True), ("slow-1", False), ("fast", False)]
    first = modification_times(workdir / "slow-0")
    summary = fit(workdir)
    assert modification_times(workdir / "slow-0") == first
    assert [run["value"] for run in summary["runs"]] == [run["value"] for run in finished[1]["runs"]]
    for name, _ in RATES:
        assert_same_run(workdir / name, finished[0] / name, step=8)


def test_memory_of_a_run_is_freed_before_the_next(tmp_path, monkeypatch):
    live_bytes, original = [], loop.fit

    def measuring_fit(*arguments):
        live_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
        return original(*arguments)

    monkeypatch.setattr(loop, "fit", measuring_fit)
    gc.collect()
    fit(tmp_path, tuple((f"run-{width}", {"model.width": width}) for width in (64, 128, 8)), sweep__x=None)
    assert live_bytes[1:] == live_bytes[:1] * 2


def test_other_runs_are_trained_after_one_has_stopped(tmp_path):
    runs = (("bad", {"data.nan_steps": (5,)}), ("good", {"seed": 3}))
    with pytest.raises(RunStopped, match=r"1 of 2 runs stopped at non-finite updates \(bad\)"):
        fit(tmp_path, runs, sweep__x=None)
    bad, good = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert not bad["complete"] and "non-finite" in bad["stopped"] and good["complete"]
    assert re.search(r"\| bad +\|.*\| stopped +\|", (tmp_path / "sweep.md").read_text())


# Overrides.


def test_overrides_are_applied_as_on_the_command_line():
    runs = (("a", {"total_epochs": 0.1, "ema_decay": None, "data.nan_steps": (1, 2), "model.trainable": "head/.*"}),)
    (run,) = sweep.expand(config(runs, ema_decay=0.9, sweep__x=None))
    assert (run.config.total_epochs, run.config.total_steps) == (0.1, None)
    assert run.config.ema_decay is None and run.config.data.nan_steps == (1, 2)
    assert run.config.model.trainable == "head/.*"


@pytest.mark.parametrize(
    "runs, changes, sentence",
    [
        (
            (("a", {"seed": 1}), ("a", {"seed": 2})),
            {},
            "config.sweep.runs has two runs named 'a', expected different names",
        ),
        ((("a", {"sed": 1}),), {}, "run 'a' of config.sweep.runs: there is no key config.sed; did you mean 'seed'?"),
        ((("a", {"seed": 1.5}),), {}, "run 'a' of config.sweep.runs: config.seed='1.5', expected int"),
        ((("a", {"seed": -1}),), {}, "run 'a' of config.sweep.runs: config.seed=-1, expected a number from 0"),
        (
            (("a", {"sweep.runs": ()}),),
            {},
            "run 'a' of config.sweep.runs: config.sweep.runs cannot be overridden in a run",
        ),
        (
            ("a", {"seed": 1}),
            {},
            "config.sweep.runs holds 'a', expected a tuple of pairs ('name', {'dotted.key': value})",
        ),
        ((("a", 1),), {}, "config.sweep.runs holds ('a', 1), expected a tuple of pairs"),
        ((("../a", {}),), {}, "config.sweep.runs names a run '../a', expected letters"),
        ((("", {}),), {}, "config.sweep.runs names a run '', expected letters"),
        (
            (("eval.json", {}),),
            {},
            "config.sweep.runs names a run 'eval.json', which a workdir holds itself: rename it",
        ),
        ((("a", {1: 2}),), {}, "run 'a' of config.sweep.runs: found the key 1, expected the name of a config key"),
        (RATES, {"sweep__more": (1,)}, "config.sweep.more=(1,), expected strings: change it"),
        (RATES, {"sweep__curves": ({},)}, "config.sweep.curves=({},), expected strings: change it"),
        ((), {}, "config.sweep.runs is empty"),
        (RATES, {"sweep__x": "optimizer.name"}, "config.sweep.x='optimizer.name' is 'adamw' in run 'slow-0', expected"),
        (RATES, {"sweep__x": "sed"}, "config.sweep.x='sed' is no config key"),
        (RATES, {"sweep__series": "sed"}, "config.sweep.series='sed' is no config key, expected one: change it; did"),
    ],
)
def test_an_invalid_sweep_is_reported_in_one_sentence(tmp_path, runs, changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        fit(tmp_path / "sweep", runs, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "sweep").exists()


def test_an_unmeasured_metric_is_reported_after_the_first_run(tmp_path, monkeypatch):
    names = record_trained(monkeypatch)
    with pytest.raises(UserError, match=r"compares runs by 'los', .*did you mean 'loss'\?"):
        fit(tmp_path, sweep__metric="los")
    assert names == ["slow-0"]


# Sweeps and single runs.


def test_train_py_runs_a_sweep(tmp_path, capsys):
    runs = (("a", {"seed": 1}), ("b", {"seed": 2}))
    settings = {"mesh.data": 1, "total_steps": 2, "eval_steps": 2, "sweep.runs": repr(runs)}
    command_line.run(train.main, arguments(tmp_path / "sweep", settings, "--progress=none"))
    assert "[2/2] b: seed=2" in capsys.readouterr().out
    assert [run["step"] for run in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]] == [2, 2]
    command_line.run(train.main, ["train.py", f"--workdir={tmp_path / 'sweep'}", "--progress=none"])  # its config.json
    assert "[2/2] b is complete" in capsys.readouterr().out


def test_eval_py_lists_the_folders_of_a_sweep(folder, capsys):
    with pytest.raises(SystemExit):
        command_line.run(eval_script.main, ["eval.py", f"--workdir={folder}"])
    folders = ", ".join(str(folder / name) for name, _ in RATES)
    assert (
        f"eval.py: error: {folder} holds a sweep, expected one run: give --workdir one of its folders ({folders})"
        in (capsys.readouterr().err)
    )
    eval_script.main(["eval.py", f"--workdir={folder / 'fast'}"])
    assert json.loads((folder / "fast" / "eval.json").read_text())["trainable_parameters"] == 153


def test_a_single_run_and_a_sweep_do_not_share_a_folder(folder, tmp_path, capsys):
    assert "holds a sweep, expected one run" in fails(capsys, folder, {"mesh.data": 1})[1]
    with pytest.raises(UserError, match="holds a single run, expected a new folder or a sweep's"):
        fit(folder / "fast")
    with pytest.raises(UserError, match="the config is a sweep of slow-0, slow-1, fast, expected one run"):
        loop.fit(config(), tmp_path / "other")
