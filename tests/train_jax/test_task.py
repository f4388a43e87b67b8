"""Tasks of a user's own: a class that is no task, or whose methods have other arguments, ends in one sentence."""

import re

import pytest

from tests.train_jax.toy_task import Toy, toy_config
from train_jax.config.configurable import Configurable
from train_jax.core.errors import UserError
from train_jax.parallel.sharding import make_mesh
from train_jax.task import Task, make_task


class NoTask(Configurable):
    """Has config keys and nothing to train."""

    defaults = Toy.defaults


class Abstract(Task):
    """Lacks every method but one."""

    def trainable(self):
        return ".*"


class OldEvaluate(Toy):
    def evaluate(self, model, workdir, split=None):
        return {}


class OldConstructor(Toy):
    def __init__(self, config):
        super().__init__(config, None)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("NoTask", "NoTask' is no train_jax.task.Task, expected a subclass: derive it"),
        (
            "Abstract",
            "Abstract does not define evaluate, init, loss, normalizer, sharding_rules, train_source, validate, which",
        ),
        ("OldConstructor", "OldConstructor(...) takes (config), expected (config, mesh): correct it"),
        (
            "OldEvaluate",
            "OldEvaluate.evaluate takes (model, workdir, split=None), expected (model, workdir, split, control_",
        ),
    ],
)
def test_a_class_that_does_not_serve_as_a_task(name, sentence):
    config = toy_config(mesh__data=1).unlock()
    config.task = f"{__name__}:{name}"
    with pytest.raises(UserError, match=re.escape(sentence)):
        make_task(config, make_mesh(config.mesh))


def test_a_task():
    config = toy_config(mesh__data=1)
    assert type(make_task(config, make_mesh(config.mesh))) is Toy
