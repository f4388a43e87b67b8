import json
import re

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from train_jax.config import renamed
from train_jax.config.arguments import parse_arg
from train_jax.config.base import (
    base_config,
    from_json,
    leaves,
    runtime_defaults,
    steps,
    task_class,
    to_json,
)
from train_jax.config.configurable import Configurable
from train_jax.core.errors import UserError

TASK = f"{__name__}:Dummy"


class Dummy(Configurable):
    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict(
            {
                "model": {"width": 8, "stages": ("a", "b", "c"), "betas": (0.9, 0.95)},
                "data": {"path": placeholder(str)},
                "batch_size": 4,
                "total_epochs": 2.0,
            }
        )
        config.patience = placeholder(int)  # also a placeholder of the runtime
        return config


def test_base_config_merges_the_task_over_the_runtime():
    config = base_config(TASK)
    assert (config.task, config.batch_size, config.model.width, config.total_epochs) == (TASK, 4, 8, 2.0)
    assert config.data.workers == 0 and config.data.path is None and config.optimizer.name == "adamw"
    assert set(leaves(config)) == set(leaves(runtime_defaults())) | {
        f"model.{x}" for x in ("width", "stages", "betas")
    } | {"data.path"}


def test_base_config_is_locked_and_typed():
    config = base_config(TASK)
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        config.batchsize = 3
    with pytest.raises(AttributeError):
        config.optimizer.lr = 3
    with pytest.raises(TypeError):
        config.total_steps = "many"
    config.total_steps = None


def test_configs_do_not_share_state():
    one, other = base_config(TASK), base_config(TASK)
    one.total_steps = 5
    one.model.width = 1
    assert other.total_steps is None and other.model.width == 8


@pytest.mark.parametrize(
    "path, sentence",
    [
        (None, "config.task=None, expected 'package.module:Class'"),
        ("train_jax.config", "expected 'package.module:Class'"),
        ("train_jax.nothing:X", "there is no module 'train_jax.nothing'"),
        ("nowhere.x:X", "there is no module 'nowhere'"),
        (f"{__name__}:Dumy", "has no 'Dumy'; did you mean 'Dummy'"),
    ],
)
def test_wrong_task_is_one_sentence(path, sentence):
    with pytest.raises(UserError, match=sentence):
        task_class(path)


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("import a_package_that_is_not_here", "line 1: ModuleNotFoundError: No module named 'a_package_that_is_not_he"),
        ("x = 1\nx.y", "line 2: AttributeError: 'int' object has no attribute 'y'"),
        ("x = (", "line 1: SyntaxError: '(' was never closed"),
    ],
)
def test_a_task_whose_module_fails_is_not_blamed_on_the_path(tmp_path, monkeypatch, code, sentence):
    (tmp_path / "broken_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"broken_task cannot be imported (broken_task.py, {sentence}")):
        task_class("broken_task:X")


def defaults(value):
    return staticmethod(lambda: value)


OLD_HOOKS = {"harmless_keys": (), "model_keys": (), "companions": dict, "single_split": True}
TASKS = {
    "NoTask": type("NoTask", (), {}),
    "SelfDefaults": type("SelfDefaults", (Configurable,), {"defaults": lambda self: ConfigDict()}),
    "FailingDefaults": type("FailingDefaults", (Configurable,), {"defaults": staticmethod(lambda: 1 / 0)}),
    "DictDefaults": type("DictDefaults", (Configurable,), {"defaults": defaults({})}),
    "OtherTypes": type("OtherTypes", (Configurable,), {"defaults": defaults(ConfigDict({"optimizer": 3}))}),
    **{f"Old_{name}": type("Old", (Dummy,), {name: value}) for name, value in OLD_HOOKS.items()},
}
globals().update(TASKS)


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("os:path", "config.task='os:path' is module, expected a subclass of train_jax.task.Task: derive it, or n"),
        ("builtins:int", "is the class int, expected a subclass of train_jax.task.Task"),
        (".x:Y", "config.task='.x:Y', expected 'package.module:Class'"),
        ("a b:Y", "config.task='a b:Y', expected 'package.module:Class'"),
        (f"{__name__}:NoTask", "is the class NoTask, expected a subclass"),
        (f"{__name__}:SelfDefaults", "SelfDefaults.defaults takes (self), expected (): correct it"),
        (f"{__name__}:FailingDefaults", "FailingDefaults.defaults() failed (test_base.py, line "),
        (f"{__name__}:DictDefaults", "DictDefaults.defaults() returned dict, expected a ConfigDict: correct it"),
        (f"{__name__}:OtherTypes", "OtherTypes.defaults() changes the type of a key ("),
        (f"{__name__}:Old_harmless_keys", "defines harmless_keys, which is now resume_safe_keys: rename it"),
        (f"{__name__}:Old_model_keys", "defines model_keys, which is now architecture_keys: rename it"),
        (f"{__name__}:Old_companions", "defines companions, which is now control_runs: rename it"),
        (f"{__name__}:Old_single_split", "defines single_split, which is now has_splits, with the opposite value: re"),
    ],
)
def test_what_is_no_task_is_one_sentence(path, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        base_config(path)
    assert "\n" not in str(caught.value)


def durations(**given):
    units = dict(run_steps=None, run_epochs=None, run_examples=None, run_percent=None)
    return ConfigDict(units | given)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"run_steps": 7}, 7),
        ({"run_steps": 0}, 0),
        ({"run_epochs": 1.0}, 25),  # 100 examples in batches of 4
        ({"run_epochs": 0.5}, 12),  # 12.5 rounds to the even neighbour
        ({"run_epochs": 0.001}, 1),  # more than nothing is at least a step
        ({"run_epochs": 0.0}, 0),
        ({"run_examples": 41}, 10),
        ({"run_percent": 0.05}, 10),  # of 200 steps
        ({"run_percent": 1.0}, 200),
    ],
)
def test_steps_converts_every_unit(given, expected):
    assert steps(durations(**given), "run", batch_size=4, epoch_examples=100, total_steps=200) == expected


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            {"run_steps": 20, "run_epochs": 1.0},
            "run_steps=20 and run_epochs=1.0 are both set, expected exactly one of run_steps, .*: set the others",
        ),
        ({}, "'run' is not set, expected exactly one of run_steps, run_epochs, run_examples, run_percent: set one"),
        ({"run_epochs": 1.0}, "run_epochs=1.0 needs the size of the training data, .*: set run_steps instead"),
        ({"run_percent": 0.5}, "run_percent=0.5 needs the length of the run, .*: set run_steps instead"),
    ],
)
def test_contradicting_durations_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        steps(durations(**given), "run", batch_size=4)


def test_steps_has_a_default_for_none():
    assert steps(durations(), "run", 4, default=0) == 0
    assert steps(runtime_defaults().optimizer, "warmup", 4, default=0) == 0


def test_json_round_trip_restores_tuples_and_types():
    config = base_config(TASK)
    config.optimizer.rates = (("vision/.*", 0.1), ("x", 1.0, 10))
    config.optimizer.learning_rate = 1
    config.data.path = "a/b"
    restored = from_json(to_json(config))
    assert leaves(restored) == leaves(config)
    assert restored.model.stages == ("a", "b", "c") and restored.optimizer.rates[1] == ("x", 1.0, 10)
    assert isinstance(restored.optimizer.learning_rate, float)
    assert restored.is_locked and to_json(restored) == to_json(config)
    restored.total_steps = None  # still a placeholder
    with pytest.raises(TypeError):
        restored.total_steps = "many"


def test_json_resolves_references():
    config = base_config(TASK)
    config.total_steps = config.get_ref("batch_size") * 2
    config.batch_size = 10
    assert json.loads(to_json(config))["total_steps"] == 20


def edited(**changes):
    return json.dumps(json.loads(to_json(base_config(TASK))) | changes)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json has no 'task'"),
        (edited(batchsize=3), "has no key 'batchsize'; did you mean 'batch_size'"),
        (edited(batch_size="three"), "config.json: batch_size='three', expected int: restore the file"),
        (edited(batch_size=None), "config.json: batch_size=None, expected int: restore the file"),
        (edited(batch_size={}), "config.json: batch_size={}, expected int: restore the file"),
        (edited(batch_size={"a": 1}), "config.json: batch_size={'a': 1}, expected int: restore the file"),
        (edited(batch_size=2.5), "config.json: batch_size=2.5, expected int: restore the file"),
        (edited(ema_decay=True), "config.json: ema_decay=True, expected float: restore the file"),
        (edited(task=5), "config.json: task=5, expected 'package.module:Class': restore the file"),
        (edited(task=["a"]), "config.json: task=['a'], expected 'package.module:Class': restore the file"),
        (edited(sweep=None), "config.json: sweep=None, expected an object with its keys: restore the"),
        (edited(mesh=[]), "config.json: mesh=[], expected an object with its keys: restore the file"),
        (edited(optimizer=None), "config.json: optimizer=None, expected an object with its keys"),
        (
            edited(sweep_metric="loss"),
            "config.json has 'sweep.metric' and its old name 'sweep_metric', expected",
        ),
        (edited(extra={}), "has no key 'extra'"),
        (edited(**{"optimizer.b1": 0.5}), "config.json has 'optimizer.b1' as a key and in its section, expected one"),
        ('{"task": "x:Y", "task": "x:Z"}', "config.json has the key 'task' twice, expected it once: remove one"),
        ("[" * 100_000, "config.json is not valid JSON"),
    ],
)
def test_damaged_json_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", [False, True])
def test_a_stored_sweep_by_old_names_is_translated(monkeypatch, old):
    """Keys in the overrides of its runs and in its axes too."""
    monkeypatch.setitem(renamed.RENAMED_KEYS, TASK, {"model.size": "model.width"})
    size, more = ("model.size", "sweep_") if old else ("model.width", "sweep.")
    runs = [["a", {size: 1, "seed": 0}], ["b", {size: 2}]]
    sweep = {f"{more}x": size, f"{more}series": f"seed,{size}"}
    if old:
        stored = edited(**{"sweep": runs} | sweep)
    else:
        stored = edited(sweep={"runs": runs, "x": size, "series": f"seed,{size}"})
    config = from_json(stored)
    assert config.sweep.runs == (("a", {"model.width": 1, "seed": 0}), ("b", {"model.width": 2}))
    assert (config.sweep.x, config.sweep.series) == ("model.width", "seed,model.width")


def test_a_stored_override_by_both_names_is_refused(monkeypatch):
    monkeypatch.setitem(renamed.RENAMED_KEYS, TASK, {"model.size": "model.width"})
    with pytest.raises(UserError, match="run 'a' of the sweep overrides a key by its old and its present name"):
        from_json(edited(sweep={"runs": [["a", {"model.size": 1, "model.width": 2}]]}))


def test_parse_arg_types_by_defaults():
    options = {"3b": False, "lr": 1e-3, "steps": 10, "res": None, "base": "tiny", "on": True}
    parsed = parse_arg("3b,lr=1e-4,steps=7,res=224,base=a=b,on=false", **options)
    assert dict(parsed) == {"3b": True, "lr": 1e-4, "steps": 7, "res": 224, "base": "a=b", "on": False}
    assert dict(parse_arg(None, **options)) == dict(parse_arg("", **options)) == options
    assert parse_arg("res=x/y.npz", **options).res == "x/y.npz"
    assert parse_arg("lr=1", **options).lr == 1.0


@pytest.mark.parametrize(
    "arg, sentence",
    [
        ("qlra", "config argument 'qlra': expected one of qlora, lr; did you mean 'qlora'"),
        ("lr", "config argument 'lr' needs a value: write lr=0.001"),
        ("lr=fast", "config argument lr='fast', expected float"),
        ("qlora=maybe", "config argument qlora='maybe', expected true or false"),
        ("lr=", "config argument 'lr' needs a value: write lr=0.001"),
    ],
)
def test_parse_arg_refuses(arg, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arg(arg, qlora=False, lr=1e-3)


@pytest.mark.parametrize("arg", ["peft", "peft="])
def test_an_argument_of_text_needs_a_text(arg):
    with pytest.raises(UserError, match="config argument 'peft' needs a value: write peft=VALUE"):
        parse_arg(arg, peft="")


def test_arguments_of_a_config_that_takes_none_or_of_one_that_has_moved():
    with pytest.raises(UserError, match="config argument 'smoke': this config takes none: leave it out"):
        parse_arg("smoke")
    moved = {"ranks": "configs/ranks.py"}
    with pytest.raises(UserError, match=r"write --config=configs/ranks\.py; its docstring says whether it takes 3b"):
        parse_arg("3b,ranks", moved, **{"3b": False})
