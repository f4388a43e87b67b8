import errno
import re
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from train_jax.config.__main__ import main as table_main
from train_jax.config.__main__ import task_table
from train_jax.config.base import base_config, to_json
from train_jax.config.command_line import default_workdir, load_from_flags, parse, run
from train_jax.config.configurable import Configurable
from train_jax.core.errors import UserError

TASK = f"{__name__}:Dummy"


class Dummy(Configurable):
    @staticmethod
    def defaults() -> ConfigDict:
        model = {"width": 8, "betas": (0.9, 0.95), "causal": False, "name": "x"}
        return ConfigDict({"model": model, "total_epochs": 1.0, "log_steps": 10})


CONFIG = f"""
from train_jax.config import base_config, parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, big=False, lr=1e-3)
    config = base_config({TASK!r})
    config.optimizer.learning_rate = arg.lr
    if arg.big:
        config.model.width = 64
    return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clevr.py").write_text(CONFIG)
    return "configs/clevr.py"


def load(*arguments, define=None):
    return load_from_flags(["train.py", *arguments], define=define)


def test_file_argument_and_default_workdir(file):
    config, workdir, _ = load(f"--config={file}:big,lr=0.5")
    assert (config.model.width, config.optimizer.learning_rate) == (64, 0.5)
    assert workdir == "runs/clevr-big-lr=0.5"
    assert config.is_locked


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("configs/clevr.py", "runs/clevr"),
        ("configs/clevr.py:3b,qlora", "runs/clevr-3b-qlora"),
        ("/a/b/clevr.py:base=/data/x y.npz", "runs/clevr-base=_data_x_y.npz"),
        ("clevr.py:../../x", "runs/clevr-.._.._x"),
    ],
)
def test_default_workdir(flag, expected):
    assert default_workdir(flag) == expected


def test_overrides_of_every_type(file):
    config, workdir, _ = load(
        f"--config={file}",
        "--workdir=there",
        "--config.batch_size=7",
        "--config.optimizer.learning_rate=1",
        "--config.model.betas=(0.8, 0.9)",
        "--config.model.causal",
        "--config.model.name=5",
        "--config.best_metric",
        "accuracy",
        "--config.optimizer.rates=(('vision/.*', 0.1),)",
        "--config.optimizer.grad_clip_norm=1.0",
    )
    assert (config.batch_size, config.model.betas, config.model.causal) == (7, (0.8, 0.9), True)
    assert (config.model.name, config.best_metric) == ("5", "accuracy")
    assert config.optimizer.rates == (("vision/.*", 0.1),)
    assert (config.optimizer.learning_rate, config.optimizer.grad_clip_norm) == (1.0, 1.0)
    assert workdir == "there"


def test_last_override_wins_and_bools_can_be_negated(file):
    config, _, _ = load(
        f"--config={file}", "--config.seed=1", "--config.seed=2", "--config.model.causal", "--noconfig.model.causal"
    )
    assert config.seed == 2 and config.model.causal is False


def test_placeholders_can_be_emptied(file):
    config, _, _ = load(f"--config={file}", "--config.total_epochs=None", "--config.best_metric=None")
    assert config.total_epochs is None and config.best_metric is None


def test_calls_do_not_see_each_other(file):
    first, _, _ = load(f"--config={file}", "--config.seed=1")
    second, _, _ = load(f"--config={file}")
    assert (first.seed, second.seed) == (1, 0)


def test_duration_on_the_command_line_replaces_the_file_s_unit(file):
    config, _, _ = load(f"--config={file}", "--config.total_steps=20", "--config.log_epochs=0.5")
    assert (config.total_steps, config.total_epochs) == (20, None)
    assert (config.log_epochs, config.log_steps) == (0.5, None)
    nested, _, _ = load(f"--config={file}", "--config.optimizer.warmup_percent=0.1")
    assert nested.optimizer.warmup_percent == 0.1 and nested.total_epochs == 1.0


def test_explicit_none_beside_a_new_unit_is_no_contradiction(file):
    config, _, _ = load(f"--config={file}", "--config.total_steps=20", "--config.total_epochs=None")
    assert (config.total_steps, config.total_epochs) == (20, None)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.batchsize=3"], "there is no key config.batchsize; did you mean 'batch_size'?"),
        (["--config.learning_rate=3"], "there is no key config.learning_rate; did you mean 'optimizer.learning_rate'?"),
        (["--config.mesh=3"], "config.mesh is a section, expected one of its keys (data, fsdp, tensor): write"),
        (["--config.optimizer=3"], "config.optimizer is a section, expected one of its keys (b1, "),
        (["--config.sweep=()"], "config.sweep is now config.sweep.runs: write that"),
        (["--config.sweep_x=seed"], "config.sweep_x is now config.sweep.x: write that"),
        (["--config.batch_size=1.5"], "config.batch_size='1.5', expected int: change the value"),
        (["--config.batch_size=None"], "config.batch_size='None', expected int: change the value"),
        (["--config.total_steps=many"], "config.total_steps='many', expected int: change the value"),
        (["--config.model.causal=perhaps"], "config.model.causal='perhaps', expected bool: change the value"),
        (["--config.optimizer.rates=(1,"], "config.optimizer.rates='(1,', expected tuple: change the value"),
        (["--config.batch_size"], "'--config.batch_size' has no value: write --config.batch_size=VALUE"),
        (["--noconfig.batch_size=3"], "'--noconfig.batch_size=3' has no value: write --config.batch_size=VALUE"),
        (["--config.total_steps=2", "--config.total_examples=9"],
         "--config.total_steps and --config.total_examples are both given, expected one: leave one out"),
        (["--workdr=x"], "unknown argument '--workdr=x'; did you mean 'workdir'?"),
        (["--noconfig.model.causal=no"], "--noconfig.model.causal=no does not take an argument: correct the flag"),
        (["--workdr", "x"], "unknown argument '--workdr'; did you mean 'workdir'?"),
        (["--config.batchsize", "3"], "there is no key config.batchsize; did you mean 'batch_size'?"),
        (["--config.seed=1", "--workdir"], "Missing value for flag --workdir: correct the flag"),
        (["--nohelp=3"], "--nohelp=3 does not take an argument: correct the flag"),
        (["--workdir="], "--workdir is empty, expected a path: write it, or leave the flag out"),
        (["--config="], "--config is empty, expected a path"),
        (["--config.task=tests.train_jax.toy_task:Toy"], "Toy' has no key 'model.betas' of this config"),
        (["stray"], "unknown argument 'stray'; write --flag=value, or --config=FILE for a config"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence(file, arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load(f"--config={file}", *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body, sentence",
    [
        ("config.batchsize = 3", "line 5: there is no key 'batchsize'; did you mean 'batch_size'?"),
        ("config.seed = 'x'", "line 5: the key 'seed' is set to x, expected int"),
        ("config.mesh = 3", "line 5: the key 'mesh' is set to 3, expected a section"),
        ("config.seed = {}", "line 5: the key 'seed' is set to another section, expected int"),
        ("return '\\0'", "get_config returned str, expected a ConfigDict"),
        ("config.sweep = (('a', {'seed': 1}),)", "line 5: config.sweep is now config.sweep.runs: write that"),
        ("config.sweep_metric = 'loss'", "line 5: config.sweep_metric is now config.sweep.metric: write that"),
        ("config.told = 'captions'", "line 5: config.told is now config.conditioning: write that"),
        ("print(config.model.nothing_like_it)", "line 5: AttributeError: "),
        ("return 1 / 0", "line 5: ZeroDivisionError: division by zero"),
        ("return (", "line 5: SyntaxError: '(' was never closed"),
        ("return type(config)()", "config.task=None, expected 'package.module:Class'"),
        ("del config.unlock().optimizer; return config", "config.optimizer.b1 is missing: start the config from"),
        ("return None", "get_config returned NoneType, expected a ConfigDict"),
        ("raise SystemExit('no data')", "line 5: the file exits (no data), expected it to return a config: remove the"),
    ],
)
def test_errors_in_a_config_file_are_one_sentence(tmp_path, body, sentence):
    path = tmp_path / "broken.py"
    path.write_text(
        f"from train_jax.config import base_config\n\n"
        f"def get_config():\n    config = base_config({TASK!r})\n    {body}\n"
    )
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load(f"--config={path}")
    assert "\n" not in str(caught.value) and ("line" not in sentence or str(path) in str(caught.value))


@pytest.mark.parametrize(
    "body, argument, sentence",
    [
        ("", "", "x.py defines no get_config(), expected a config file: add it"),
        ("get_config = 3", "", "x.py defines no get_config(), expected a config file: add it"),
        ("def get_config(): pass", ":smoke", "x.py:smoke: get_config takes no argument: write --config="),
        ("def get_config(arg): pass", "", "x.py: get_config requires an argument: write --config="),
        ("def get_config(a, b): pass", ":smoke", "x.py:smoke: get_config takes (a, b), expected (smoke): correct it"),
        ("import sys; sys.exit(3)", "", "line 1: the file exits (3), expected it to return a config: remove the call"),
    ],
)
def test_a_config_file_of_another_form(tmp_path, body, argument, sentence):
    (tmp_path / "x.py").write_text(body)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(f"--config={tmp_path / 'x.py'}{argument}")


def test_a_config_imports_what_is_beside_its_folder(tmp_path):
    """As `from configs import clevr` does; an installed command has no folder of its own on the path."""
    folder = tmp_path / "runs_of_mine"
    folder.mkdir()
    (folder / "first.py").write_text(f"from train_jax.config import base_config\n\n\n"
                                     f"def get_config():\n    return base_config({TASK!r})\n")  # fmt: skip
    (folder / "second.py").write_text("from runs_of_mine import first\n\n\n"
                                      "def get_config():\n    config = first.get_config()\n    config.seed = 5\n"
                                      "    return config\n")  # fmt: skip
    assert load(f"--config={folder / 'second.py'}")[0].seed == 5


def test_config_argument_that_is_unknown_keeps_its_own_sentence(file):
    with pytest.raises(UserError, match="config argument 'bigg': expected one of big, lr; did you mean 'big'"):
        load(f"--config={file}:bigg")


def test_missing_file_names_the_nearest(file):
    with pytest.raises(UserError, match="there is no file configs/clever.py; did you mean 'configs/clevr.py'"):
        load("--config=configs/clever.py")


def test_no_config_at_all():
    with pytest.raises(UserError, match="neither --config nor --workdir is given"):
        load()


def test_workdir_s_own_config(file, tmp_path):
    stored = base_config(TASK)
    stored.seed = 9
    stored.optimizer.rates = (("a", 0.5),)
    (tmp_path / "config.json").write_text(to_json(stored))
    config, workdir, _ = load(f"--workdir={tmp_path}", "--config.model.width=3")
    assert (config.seed, config.model.width, config.optimizer.rates) == (9, 3, (("a", 0.5),))
    assert workdir == str(tmp_path)
    with pytest.raises(UserError, match="nowhere/config.json does not exist, expected a workdir of a run"):
        load("--workdir=nowhere")


def test_entry_points_add_flags(file):
    def define(values):
        flags.DEFINE_bool("print_batch", False, "prints a batch", flag_values=values)
        flags.DEFINE_multi_string("image", [], "an image", flag_values=values)
        flags.DEFINE_enum("split", "train", ["train", "validation"], "which", flag_values=values)

    _, _, values = load(f"--config={file}", "--image=a", "--print_batch", "--image", "b", define=define)
    assert values.print_batch and values.image == ["a", "b"] and values.split == "train"
    with pytest.raises(UserError, match="split=tain.*should be one of"):
        load(f"--config={file}", "--split=tain", define=define)


def copy_flags(values):
    flags.DEFINE_string("format", None, "of the copy", flag_values=values)


def test_a_command_of_places_and_flags_in_any_order():
    places, values = parse(["copy", "a", "--format", "x", "b"], "", copy_flags, "SRC DST")
    assert (places, values.format) == (["a", "b"], "x")
    assert parse(["copy", "a"], "", copy_flags, "SRC [DST]", counts=(1, 2))[0] == ["a"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "found nothing, expected SRC DST: see --help"),
        (["a", "b", "c"], "found a b c, expected SRC DST: see --help"),
        (["a", "b", "--fromat=x"], "unknown argument '--fromat=x'; did you mean 'format'?"),
        (["a", "b", "--zzz"], "unknown argument '--zzz': see --help"),
        (["a", "b", "--format"], "Missing value for flag --format: correct the flag"),
    ],
)
def test_mistakes_in_places_and_flags_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        parse(["copy", *arguments], "", copy_flags, "SRC DST")


def test_values_of_keys_may_hold_anything(file):
    config, _, _ = load(f"--config={file}", "--config.model.name=a=b\n--c", "--config.seed", "-1")
    assert (config.model.name, config.seed) == ("a=b\n--c", -1)


def test_a_package_is_named_as_it_is_called():
    """Not `__main__.py`, which is what its argv holds."""
    command = [sys.executable, "-m", "train_jax.config", "os:path"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("python -m train_jax.config: error: config.task='os:path' is module, expected ")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_the_tables_of_keys(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        table_main(["x", flag])
    assert caught.value.code == 0 and "python -m train_jax.config paligemma_jax" in capsys.readouterr().out


def test_the_table_of_a_task_without_declared_keys():
    """Its own keys, and the runtime's whose defaults it changes."""
    lines = task_table(TASK).splitlines()
    assert "| `model.width` | `8` | int |  |  |" in lines
    assert any(line.startswith("| `log_steps` | `10` | int, 1 or more, or None | interval between") for line in lines)
    assert len(lines) == 2 + 6


def test_a_task_without_keys_is_said_to_have_none():
    assert task_table("train_jax.task:Task").startswith("train_jax.task:Task has no config keys of its own; ")


def test_help_prints_usage_and_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        load_from_flags(["train.py", "--help"], usage="Trains a model.")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith("Trains a model.") and "--workdir" in out


def test_user_errors_end_with_status_2_and_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no file there that could be meant
    with pytest.raises(SystemExit) as caught:
        run(load_from_flags, ["bin/train.py", "--config=nowhere.py"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train.py: error: --config=nowhere.py: there is no file nowhere.py\n"


def test_a_path_that_cannot_be_opened_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(lambda argv: tmp_path.read_text(), ["bin/eval.py"])
    assert caught.value.code == 2
    sentence = f"{tmp_path} cannot be used (Is a directory): correct the path or its permissions."
    assert capsys.readouterr().err == f"eval.py: error: {sentence}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "input/output error"), OSError("no number")])
def test_other_errors_keep_their_traceback(error):
    def fails(argv):
        raise error

    with pytest.raises(type(error)):
        run(fails, ["train.py"])
