"""The models are written without adapters: they import none, and have no attributes and parameters for one."""

import ast
import re
from pathlib import Path

import pytest

import paligemma_jax.models

FILES = sorted(Path(paligemma_jax.models.__file__).parent.rglob("*.py"))
ATTENTION = "paligemma_jax.models.attention"
ALLOWED = {  # of prefix-LM masks
    "prefix",
    *(f"{ATTENTION}.{name}" for name in ("prefix_mask", "prefix_lm_mask", "masks.prefix_mask", "masks.prefix_lm_mask")),
}
SLOTS = re.compile(r"lora|peft|adapter|prompt|prefix|bottleneck|last_layers", re.I)


def names_of(source: str) -> set[str]:
    """Returns the names of attributes, parameters, and arguments given by name, and of imported modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):  # attributes of a class
                names.add(name)
            case ast.ImportFrom(module=str(name)):
                names |= {f"{name}.{alias.name}" for alias in node.names}
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_model_has_no_slots_of_adapters(file):
    names = names_of(file.read_text(encoding="utf-8"))
    assert not [name for name in names if name.startswith("paligemma_jax.adapt")]
    assert not [name for name in names if SLOTS.search(name) and name not in ALLOWED]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(x, prompts=None): ...", "prompts"),
        ("self.prompts = None", "prompts"),
        ("f(x, lora_rank=2)", "lora_rank"),
        ("class A:\n    soft_prompt: int", "soft_prompt"),
        ("from paligemma_jax.adapt.few_shot import prompts", "paligemma_jax.adapt.few_shot.prompts"),
        ("import paligemma_jax.adapt.lora as x", "paligemma_jax.adapt.lora"),
    ],
)
def test_slots_are_found(source, name):
    assert name in names_of(source) and SLOTS.search(name)
