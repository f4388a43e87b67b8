"""Errors on the command line of train.py: one sentence, exit status 2, before anything is compiled."""

import subprocess
import sys

import pytest

import train
from tests.train_jax.runs import ROOT, arguments, fails
from train_jax import loop
from train_jax.config import command_line
from train_jax.step import placement


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test if a model is made or a step compiled."""

    def compiled(*args, **options):
        raise AssertionError("the run went on")

    monkeypatch.setattr(placement, "place", compiled)
    monkeypatch.setattr(loop.Trainer, "train", compiled)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer.learning_rat": 1}, "there is no key config.optimizer.learning_rat; did you mean "
         "'optimizer.learning_rate'?"),
        ({"model.widht": 1}, "there is no key config.model.widht; did you mean 'model.width'?"),
        ({"batch_size": "many"}, "config.batch_size='many', expected int: change the value"),
        ({"total_steps": "1.5"}, "config.total_steps='1.5', expected int: change the value"),
        ({"total_steps": 5, "total_epochs": 1}, "--config.total_steps and --config.total_epochs are both given, "
         "expected one: leave one out"),
        ({"total_steps": "None"}, "the duration 'total' is not set, expected exactly one of total_steps, total_epochs, "
         "total_examples: set one"),
        ({"eval_steps": 0}, "config.eval_steps=0, expected 1 or more: change it"),
        ({"total_steps": -1}, "config.total_steps=-1, expected 0 or more: change it"),
        ({"batch_size": 12}, "config.batch_size=12 does not divide over the mesh's data=8 x fsdp=1 devices: use a "
         "multiple of 8, or fewer devices with config.mesh.data"),
        ({"micro_batch": 3}, "config.batch_size=8 does not divide into micro-batches of 3: set config.micro_batch to "
         "one of 1, 2, 4, 8"),
        ({"mesh.data": 16}, "mesh data=16 x fsdp=1 x tensor=1 needs 16 devices and there are 8, expected at most that "
         "many: change config.mesh, or set one axis to -1"),
        ({"compute_dtype": "float8"}, "config.compute_dtype='float8', expected one of float32, bfloat16, float16: "
         "change it"),
        ({"patience": 2}, "config.patience is set but config.best_metric is None: name the metric that decides"),
        ({"optimizer.name": "adamm"}, "config.optimizer.name='adamm', expected one of adamw, adam, sgd, adafactor, "
         "lion, adamw_8bit: change it; did you mean 'adam'?"),
        ({"optimizer.warmup_steps": 100}, "the warm-up takes 100 steps, expected 0 to the run's 8; shorten it or train "
         "longer"),
    ],
)  # fmt: skip
def test_an_invalid_config(tmp_path, capsys, changes, sentence):
    assert fails(capsys, tmp_path / "run", changes) == (2, f"train.py: error: {sentence}")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_runs")
def test_a_workdir_that_cannot_be_created(tmp_path, capsys):
    (tmp_path / "file").touch()
    sentence = f"{tmp_path / 'file'} cannot be made (File exists), expected a folder: choose another."
    assert fails(capsys, tmp_path / "file", {}) == (2, f"train.py: error: {sentence}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.trainable": "layer/.*"}, "trainable parameters: 'layer/.*' matches none of 6 paths (nearest are "
         "layers/bias, layers/kernel"),
        ({"model.trainable": "("}, "'(' is not a regular expression"),
        ({"optimizer.warmup_epochs": 1.0}, "the warm-up takes 125 steps, expected 0 to the run's 8"),
        ({"optimizer.weight_decay": 0.1, "optimizer.weight_decay_mask": "nothing"}, "weight_decay_mask of "
         "weight_decay=0.1: 'nothing' matches none of 4 paths"),
        ({"data.examples": 0}, "the training data has no examples, expected at least one"),
    ],
)  # fmt: skip
def test_an_invalid_model_or_optimizer(tmp_path, capsys, monkeypatch, changes, sentence):
    monkeypatch.setattr(loop.Trainer, "train", lambda *args: pytest.fail("the run went on"))
    status, line = fails(capsys, tmp_path / "run", changes)
    assert status == 2 and line.startswith(f"train.py: error: {sentence}")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--print_bach"], "unknown argument '--print_bach'; did you mean 'print_batch'?"),
        (["--process_id=0"], "--coordinator and --num_processes not given, expected --coordinator, --num_processes and "
         "--process_id together: add what is missing, or use --distributed alone on a cluster"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2, expected 0 to 1: correct it or "
         "--num_processes"),
        (["--coordinator=here", "--num_processes=2", "--process_id=1"], "--coordinator=here, expected host:port such "
         "as 10.0.0.1:1234: add the port"),
    ],
)  # fmt: skip
def test_flags(tmp_path, capsys, more, sentence):
    assert fails(capsys, tmp_path / "run", {}, *more) == (2, f"train.py: error: {sentence}")


def test_print_batch(tmp_path, capsys):
    command_line.run(train.main, arguments(tmp_path / "run", {}, "--print_batch"))
    assert capsys.readouterr().out.startswith("8 rows: ")
    assert not (tmp_path / "run").exists()


def test_no_traceback_from_the_real_command(tmp_path):
    """Runs one error in a subprocess: stderr is one line."""
    command = [sys.executable, *arguments(tmp_path / "run", {"batch_sise": 4})]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train.py: error: there is no key config.batch_sise; did you mean 'batch_size'?\n"
    assert (ROOT / "train.py").exists()
