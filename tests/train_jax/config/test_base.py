import json

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

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
from train_jax.core.errors import UserError

TASK = f"{__name__}:Dummy"


class Dummy:
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


def test_missing_dependency_of_a_task_is_not_blamed_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "broken_task.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        task_class("broken_task:X")


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
        ({"run_steps": -1}, "run_steps=-1, expected 0 or more"),
        ({"run_percent": 5.0}, "run_percent=5.0, expected a fraction from 0 to 1"),
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
        (edited(batch_size="three"), "config.json: batch_size='three', expected int"),
    ],
)
def test_damaged_json_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        from_json(text)


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
    ],
)
def test_parse_arg_refuses(arg, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arg(arg, qlora=False, lr=1e-3)
