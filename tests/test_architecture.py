"""Checks docs/architecture.md: each function that it names exists and calls the next, or passes it as an argument."""

import ast
import importlib
import itertools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LINES = re.findall(r"^(\S.*?) {2,}(\S+:\S+ > .*)$", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
PACKAGES = ("train_jax", "paligemma_jax", "flow_jax")
README = ("train_jax/loop.py", "paligemma_jax/models/gemma.py", "flow_jax/tasks/flow_task.py")
"""Files of the README's reading path; everything is at most two jumps from one of them."""
COMMAND = "train_jax/commands/train.py:main"  # what train.py calls
INSTANCES = {"Gemma": "decoder", "GemmaBlock": "block", "GemmaAttention": "self_attn", "Projection": "o_proj"}
"""Names of the instances whose `__call__` the page names."""


def function_of(place: str) -> ast.AST:
    """Returns the syntax tree of a function given as file:Class.function."""
    file, _, path = place.partition(":")
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in path.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        node = next(child for child in ast.walk(node) if isinstance(child, kinds) and child.name == name)
    return node


def module_of(file: str) -> Any:
    """Returns the imported module of a file."""
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def called_in(function: ast.AST, names: dict[str, Any]) -> list[Any]:
    """Returns what a function calls or passes to a call: of `a.b(c.d)`, `a.b` and `c.d`.

    Args:
      function: its syntax tree; its own imports are names too.
      names: the values of its module by name.

    Returns:
      The value of what starts with a module or a global, such as a function; the last name ("b") of all else, such as a
      method of a variable.
    """
    names = dict(names)
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                names[alias.asname or alias.name] = imported(node.module, alias.name)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    values = [value for call in calls for value in (call.func, *call.args, *(word.value for word in call.keywords))]
    return [called(value, names) for value in values if isinstance(value, ast.Name | ast.Attribute)]


def imported(module: str, name: str) -> Any:
    """Returns what `from module import name` binds."""
    value = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(f"{module}.{name}") if value is None else value


def called(value: ast.expr, names: dict[str, Any]) -> Any:
    """Returns the value of a global `a` or `a.b`, or the last name of an attribute of a variable."""
    if isinstance(value, ast.Name):
        return names.get(value.id, value.id)
    assert isinstance(value, ast.Attribute)
    owner = called(value.value, names) if isinstance(value.value, ast.Name) else None
    return getattr(owner, value.attr) if isinstance(owner, ModuleType | type) else value.attr


def test_names_of_modules_are_resolved_and_those_of_variables_are_not():
    function = ast.parse("def f():\n    a, b.c = d.e\n    return g.h(ast.parse, Path, k=l.m.n)").body[0]
    assert called_in(function, globals()) == ["h", ast.parse, Path, "n"]
    lazy = ast.parse("def f():\n    from os import path\n    path.join()").body[0]
    assert called_in(lazy, {}) == [os.path.join]


@pytest.mark.parametrize("what, line", LINES)
def test_a_line_starts_at_the_command_or_in_a_file_of_the_reading_path(what, line):
    start = line.split(" > ")[0]
    assert start == COMMAND or start.partition(":")[0] in README, what


@pytest.mark.parametrize("what, line", LINES)
def test_each_function_calls_the_next_or_passes_it_on(what, line):
    places = line.split(" > ")
    for caller, place in itertools.pairwise(places):
        names = vars(module_of(caller.partition(":")[0]))
        file, _, path = place.partition(":")
        owner, _, name = path.rpartition(".")
        if name == "__call__":
            targets = [INSTANCES[owner]]
        elif name == "__init__":
            targets = [getattr(module_of(file), owner)]
        else:  # a function, or the name of a method or of a function of a module that a variable holds
            targets = [name] if owner else [getattr(module_of(file), name), name]
        function_of(place)
        values = called_in(function_of(caller), names)
        assert any(target in values for target in targets), f"{what}: {caller} does not call {place}"
    files = [place.partition(":")[0] for place in places]
    start = max(i for i, file in enumerate(files) if file in README)
    assert len(dict.fromkeys(files[start:])) <= 3, f"{what}: more than two jumps"


def test_a_batch_climbs_once():
    """From the pipeline to the loss, one call goes from a lower floor to a higher one: the runtime's to the task."""
    floors = ("train_jax/", "paligemma_jax/models/", "paligemma_jax/losses/", "paligemma_jax/tasks/")
    for line in (line for what, line in LINES if what in ("loss of the main job", "a batch in the model")):
        heights = [next(i for i, floor in enumerate(floors) if place.startswith(floor)) for place in line.split(" > ")]
        assert sum(after > before for before, after in itertools.pairwise(heights)) == 1


def test_the_page_has_every_jump():
    batches = {"the stream of batches", "reading a batch", "a batch in the model"}
    losses = {"loss of the main job", "the flow loss", "the SigLIP loss"}
    arrays = {"sharding rules", "placing the arrays"}
    assert {what for what, _ in LINES} == batches | losses | arrays | {"the step", "LoRA forward"}


def test_the_readme_has_the_reading_path():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = text.partition("## Reading path")[2].partition("\n## ")[0]
    assert all(f"`{file}`" in path and (ROOT / file).is_file() for file in README)


def test_memos_of_a_process_have_a_size():
    """Memos of functions inside functions end with the call."""
    unbounded = []
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for node in [child for owner in (module, *classes) for child in owner.body]:
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            unbounded += [f"{file.name}: {one}" for one in decorators if re.search(r"\bcache$|lru_cache.*None", one)]
    assert not unbounded
