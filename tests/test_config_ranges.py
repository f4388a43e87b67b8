"""Ranges of the config keys of every task: impossible values are refused before anything is built."""

import importlib
import inspect
import math
import pkgutil
import re
from pathlib import Path

import pytest

import flow_jax.tasks
import paligemma_jax.tasks
from train_jax.commands.train import main as train
from train_jax.config.base import base_config, known_keys, node, task_class
from train_jax.config.validate import validate
from train_jax.core.config_keys import Key
from train_jax.core.errors import UserError
from train_jax.task import Task

PAGE = (Path(__file__).parents[1] / "docs/config.md").read_text(encoding="utf-8")
TASKS = re.findall(r"^## `(.+:.+)`$", PAGE, re.MULTILINE)
ANY_NUMBER = {"init.bias", "eval.guidance"}
"""Keys that take any finite number, which docs/config.md names."""

OWN_FORM = {"optimizer.rates", "sweep.runs", "adapter.rank_pattern", "adapter.alpha_pattern", "consistency.prompts"}
"""Tuples of pairs and triples, which the task or the runtime checks itself."""


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def keys_by_task() -> dict[str, dict[str, Key]]:
    """The keys of every task, without those that a task before it has too."""
    result, seen = {}, {}
    for task in TASKS:
        keys = known_keys(task_class(task))
        result[task] = {name: key for name, key in keys.items() if seen.get(name) != key}
        seen |= keys
    return result


KEYS = keys_by_task()


def impossible(key: Key) -> list:
    """Returns values that a declaration refuses, beside those of another type."""
    step = 1 if key.number_type is int else 1e-3
    values = [bound for bound in (key.above, key.below) if bound is not None]
    values += [key.minimum - step] if key.minimum is not None else []
    values += [key.maximum + step] if key.maximum is not None and key.maximum < math.inf else []
    values += ["no such choice"] if key.choices is not None and key.number_type is None else []
    values += [0] if key.choices is not None and key.number_type is int else []
    values += [2**53, -(2**53), 10**400] if key.number_type is int else []
    values += [math.nan] if key.number_type is float else []
    values += [math.inf, -math.inf, 1e39] if key.number_type is float and key.maximum != math.inf else []
    if key.item_type is None:
        return values
    other = 1 if key.item_type is str else "one"
    return [(value,) * (key.length or 1) for value in [*values, other]] + ([(1,) * 9] if key.length else [])


OF_ANOTHER_TYPE = {str: 1, bool: 2, int: True, float: "1.0", tuple: "text"}
"""A value that has not the type of a key, by that type."""


def refusal(task: str, name: str, value: object) -> str:
    """Returns the error of a run's validation for one changed value of a task's defaults, "" if there is none."""
    config = base_config(task)
    with config.unlocked():
        parent, last = node(config, name)
        del parent[last]  # a ConfigDict refuses other types itself; a config.json and a config file may hold them
        parent[last] = value
    try:
        validate(config, training=False)
    except UserError as error:
        return str(error)
    return ""


def test_the_page_has_a_table_of_every_task():
    for package in (paligemma_jax.tasks, flow_jax.tasks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    tasks = {cls for cls in subclasses(Task) if cls.__module__.split(".")[0] in ("paligemma_jax", "flow_jax")}
    assert {cls for cls in tasks if not inspect.isabstract(cls)} == {task_class(task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_every_number_has_a_range(task):
    unbounded = {
        name
        for name, key in known_keys(task_class(task)).items()
        if key.number_type and (key.minimum, key.above, key.choices) == (None, None, None)
    }
    assert unbounded <= ANY_NUMBER and all(f"`{name}`" in PAGE.partition("\n## ")[0] for name in ANY_NUMBER)
    keys = known_keys(task_class(task)).items()
    assert {name for name, key in keys if key.value_type is tuple and key.item_type is None} <= OWN_FORM


@pytest.mark.parametrize("task", TASKS)
def test_impossible_values_are_refused(task):
    """In one sentence that names the key and says what was found and what was expected."""
    for name, key in KEYS[task].items():
        if name == "task":  # decides which keys there are
            continue
        key.check(name, key.default)
        messages = [refusal(task, name, value) for value in (OF_ANOTHER_TYPE[key.value_type], *impossible(key)[:1])]
        for value in impossible(key)[1:]:
            with pytest.raises(UserError, match=rf", expected .*{re.escape(key.values())}") as caught:
                key.check(name, value)
            messages.append(str(caught.value))
        for message in messages:
            assert re.match(rf"config\.{re.escape(name)}( holds |=)[^\n]{{,120}}, expected [^\n]+$", message), message


@pytest.mark.parametrize(
    ("config", "override"),
    [
        ("flow_digits", "model.unet.width=0"),
        ("flow_digits", "eval.features=nowhere:features"),
        ("flow_2d", "model.activation=sigmoidal"),
        ("flow_2d", "coupling.epsilon=-1"),
        ("clevr", "data.families=('colour',)"),
    ],
)
def test_nothing_is_built_for_a_refused_value(config, override, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = override.partition("=")[0]
    root = Path(__file__).parents[1]
    with pytest.raises(UserError, match=name.rpartition(".")[2]):
        train(["train.py", f"--config={root}/configs/{config}.py", f"--workdir={tmp_path / 'run'}",
               f"--config.{override}"])  # fmt: skip
    assert not list(tmp_path.iterdir())
