"""Checks docs/architecture.md: each function that it names exists and calls the next, or passes it as an argument."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = re.findall(r"^(\S.*?) {2,}(\S+:\S+ > .*)$", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
PACKAGES = ("train_jax", "paligemma_jax", "flow_jax")
README = ("train_jax/loop.py", "paligemma_jax/models/gemma.py", "flow_jax/tasks/flow_task.py")
"""Files of the README's reading path; everything is at most two jumps from one of them."""
COMMAND = "train_jax/commands/train.py:main"  # what train.py calls


def function_of(place: str) -> ast.AST:
    """Returns the syntax tree of a function given as file:Class.function."""
    file, _, path = place.partition(":")
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in path.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        node = next(child for child in ast.walk(node) if isinstance(child, kinds) and child.name == name)
    return node


def called_in(function: ast.AST) -> set[str]:
    """Returns the last names of what a function calls or passes to a call: of `a.b(c.d)`, b and d."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    values = [value for call in calls for value in (call.func, *call.args, *(word.value for word in call.keywords))]
    names = {value.id for value in values if isinstance(value, ast.Name)}
    return names | {value.attr for value in values if isinstance(value, ast.Attribute)}


def test_a_bare_name_is_no_call():
    assert called_in(ast.parse("def f():\n    a, b.c = d.e\n    return g.h(i.j, k=l.m)")) == {"h", "j", "m"}


@pytest.mark.parametrize("what, line", LINES)
def test_a_line_starts_at_the_command_or_in_a_file_of_the_reading_path(what, line):
    start = line.split(" > ")[0]
    assert start == COMMAND or start.partition(":")[0] in README, what


@pytest.mark.parametrize("what, line", LINES)
def test_each_function_calls_the_next_or_passes_it_on(what, line):
    places = line.split(" > ")
    functions = [function_of(place) for place in places]
    for caller, place in zip(functions, places[1:], strict=False):
        owner, _, name = place.partition(":")[2].rpartition(".")
        called = {"__init__": owner, "__call__": "o_proj"}.get(name, name)  # a projection is called by its attribute
        assert called in called_in(caller), f"{what}: {place} is not called"
    if what != "a batch":  # it goes on below the loss
        files = [place.partition(":")[0] for place in places]
        start = max(i for i, file in enumerate(files) if file in README)
        assert len(dict.fromkeys(files[start:])) <= 3, f"{what}: more than two jumps"


def test_a_batch_climbs_once():
    """From the pipeline to the loss, one call goes from a lower floor to a higher one: the runtime's to the task."""
    (line,) = (line for what, line in LINES if what == "a batch")
    floors = ("train_jax/", "paligemma_jax/models/", "paligemma_jax/losses/", "paligemma_jax/tasks/")
    heights = [next(i for i, floor in enumerate(floors) if place.startswith(floor)) for place in line.split(" > ")]
    assert sum(after > before for before, after in zip(heights, heights[1:], strict=False)) == 1


def test_the_page_has_every_jump():
    named = {"loss of the main job", "the step", "a batch", "LoRA forward", "the flow loss", "sharding rules"}
    assert {what for what, _ in LINES} == named | {"the SigLIP loss"}


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
