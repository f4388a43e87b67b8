import math
import re

import pytest
from ml_collections import ConfigDict

from train_jax.config.base import base_config
from train_jax.config.configurable import Configurable
from train_jax.config.validate import validate
from train_jax.core.errors import UserError

TASK = f"{__name__}:Dummy"


class Dummy(Configurable):
    @staticmethod
    def defaults() -> ConfigDict:
        return ConfigDict(
            {
                "model": {
                    "betas": (0.9, 0.95),
                    "stages": ("a", "b", "c"),
                    "dropout": 0.0,
                    "causal": False,
                    "free": None,
                },
                "total_steps": 10,
                "log_steps": 1,
                "eval_epochs": 1.0,
                "checkpoint_percent": 0.1,
                "batch_size": 16,
            }
        )


def config(**changes):
    made = base_config(TASK).unlock()
    made.update_from_flattened_dict(changes)
    return made


def test_defaults_are_valid():
    validate(config())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.learning_rate": 1},
        {"optimizer.rates": (("vision/.*", 0.1), ("x", 2, 100))},
        {"model.stages": ("a",)},
        {"model.stages": ()},
        {"model.free": (1, "x")},
        {"optimizer.grad_clip_norm": 1.0},
        {"micro_batch": 8},
        {"total_steps": None, "total_epochs": 0.5},
        {"total_steps": 0},
        {"optimizer.warmup_percent": 0.1},
        {"optimizer.warmup_steps": 10},
        {"optimizer.warmup_epochs": 3.0},  # of unknown length until the data are there
        {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.schedule": "rsqrt"},
        {"best_metric": "accuracy", "patience": 2, "load_best_at_end": True},
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "batch_size": 4},
    ],
)
def test_valid_changes_pass(changes):
    validate(config(**changes))


def raw(key, value):
    """Sets a value that ConfigDict's own type check would refuse or convert."""
    made = config()
    *parents, name = key.split(".")
    inner = made
    for parent in parents:
        inner = inner[parent]
    with inner.ignore_type():
        inner[name] = value
    return made


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("batchsize", 3, "there is no key config.batchsize; did you mean 'batch_size'?"),
        ("optimizer.lr", 3.0, "there is no key config.optimizer.lr"),
        ("optimizer.learningrate", 3.0, "config.optimizer.learningrate; did you mean 'optimizer.learning_rate'?"),
        ("batch_size", True, "config.batch_size=True is bool, expected int: change it"),
        ("batch_size", 2.5, "config.batch_size=2.5 is float, expected int: change it"),
        ("batch_size", None, "config.batch_size=None, expected int: set a value"),
        ("total_steps", "x", "config.total_steps='x' is str, expected int: change it"),
        ("model.causal", 1, "config.model.causal=1 is int, expected bool: change it"),
        ("model.betas", (0.5,), "config.model.betas=(0.5,), expected a pair like (0.9, 0.95): change it"),
        ("model.betas", (0.5, "x"), "config.model.betas=(0.5, 'x'), expected a pair like (0.9, 0.95): change it"),
        ("model.stages", ("a", 1), "config.model.stages=('a', 1), expected a tuple like ('a', 'b', 'c'): change it"),
        ("compute_dtype", "bf16", "config.compute_dtype='bf16', expected one of float32, bfloat16, float16: change it"),
        ("best_mode", "maximum", "config.best_mode='maximum', expected one of max, min: change it"),
        ("data.on_error", "ignore", "config.data.on_error='ignore', expected one of skip, raise: change it"),
        ("data.max_bad_fraction", 5.0, "config.data.max_bad_fraction=5.0, expected a number from 0 to 1: change it"),
        ("batch_size", 0, "config.batch_size=0, expected 1 or more: change it"),
        ("seed", -1, "config.seed=-1, expected a number from 0 to 2^32 - 1: change it"),
        ("patience", 2, "config.patience is set but config.best_metric is None: name the metric that decides"),
        ("load_best_at_end", True, "config.load_best_at_end is set but config.best_metric is None"),
        ("total_epochs", 1.0, "total_steps=10 and total_epochs=1.0 are both set, expected exactly one of"),
        ("total_steps", None, "the duration 'total' is not set, expected exactly one of"),
        ("log_steps", 0, "config.log_steps=0, expected 1 or more: change it"),
        ("optimizer.warmup_percent", 3.0, "config.optimizer.warmup_percent=3.0, expected a number from 0 to 1: change"),
        ("optimizer.warmup_epochs", math.inf, "warmup_epochs=inf, expected 0 or more, finite in float32: change it"),
        ("optimizer.name", "adamm", "config.optimizer.name='adamm', expected one of adamw, adam, sgd, adafactor, lion, "
         "adamw_8bit: change it; did you mean 'adam'?"),
        ("optimizer.schedule", "cosin", "config.optimizer.schedule='cosin', expected one of constant, linear, cosine, "
         "rsqrt: change it; did you mean 'cosine'?"),
        ("optimizer.learning_rate", -1.0, "config.optimizer.learning_rate=-1.0, expected 0 or more"),
        ("optimizer.learning_rate", math.nan, "config.optimizer.learning_rate=nan, expected 0 or more"),
        ("optimizer.end_factor", 0.1, "end_factor=0.1 has no meaning for schedule='constant'"),
        ("optimizer.grad_clip_norm", 0.0, "config.optimizer.grad_clip_norm=0.0, expected a number above 0: change"),
        ("optimizer.weight_decay", -0.1, "config.optimizer.weight_decay=-0.1, expected 0 or more: change it"),
        ("optimizer.weight_decay_mask", "(", "'(' is not a regular expression"),
        ("optimizer.eps", -1e-8, "config.optimizer.eps=-1e-08, expected 0 or more: change it"),
        ("optimizer.b2", 1.0, "config.optimizer.b2=1.0, expected 0 or more and below 1: change it"),
        ("optimizer.momentum", 1.5, "config.optimizer.momentum=1.5, expected 0 or more and below 1: change it"),
        ("optimizer.rates", (("vision/.*",),), "rates has ('vision/.*',), expected (pattern, factor) or (pattern, "),
        ("optimizer.rates", (("vision/.*", "x"),), "rates has ('vision/.*', 'x'), expected (pattern, factor) or "),
        ("optimizer.rates", (("vision/.*", 1.0, 0.5),), "rates has ('vision/.*', 1.0, 0.5), expected (pattern, "),
        ("optimizer.rates", (("vision/.*", 0.0),), "factor of 'vision/.*' is 0.0, expected a finite number above 0"),
        ("optimizer.rates", (("vision/(", 2.0),), "'vision/(' is not a regular expression"),
        ("optimizer.warmup_steps", 11, "the warm-up takes 11 steps, expected 0 to the run's 10; shorten it or train"),
        ("optimizer.warmup_examples", 320, "the warm-up takes 20 steps, expected 0 to the run's 10"),
        ("micro_batch", 5, "config.batch_size=16 does not divide into micro-batches of 5: set config.micro_batch to "
         "one of 1, 2, 4, 8, 16"),
        ("micro_batch", 4, "config.micro_batch=4 does not divide over the mesh's data=8 x fsdp=1 devices: use a "
         "multiple of 8, or fewer devices with config.mesh.data"),
        ("batch_size", 12, "config.batch_size=12 does not divide over the mesh's data=8 x fsdp=1 devices"),
        ("mesh.tensor", 16, "mesh data=-1 x fsdp=1 x tensor=16 on 8 devices"),
        ("optimizer", 3, "config.optimizer"),
        ("task", "nowhere:X", "there is no module 'nowhere'"),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence(key, value, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        validate(raw(key, value))
    assert "\n" not in str(caught.value)


def test_missing_key_is_named():
    made = config()
    del made.optimizer["b1"]
    with pytest.raises(UserError, match="config.optimizer.b1 is missing: start the config from base_config"):
        validate(made)
