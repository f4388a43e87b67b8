"""Kinds of questions, read from their programs; and disjoint scenes of pretraining and task."""

import hashlib
import json
from collections import Counter

import pytest

from paligemma_jax.data.synthetic_clevr import FAMILIES, AnswerBalance, generate_questions
from paligemma_jax.data.synthetic_clevr.build import split_scene

ATTRIBUTES = ("size", "color", "material", "shape")
SAME = tuple(f"same {name}" for name in ATTRIBUTES)
HOPS = ("no hop", "one hop")
# Required kinds: exist, count, compare number, query, compare attribute; one and two hops, and, or, same.
EXPECTED = {
    *(("exist", form) for form in (*HOPS, "two hops", *SAME)),
    *(("count", form) for form in (*HOPS, "two hops", "and", "or", *SAME)),
    *((function, form) for function in ("equal_integer", "less_than", "greater_than") for form in HOPS),
    *((f"query_{name}", form) for name in ATTRIBUTES for form in (*HOPS, "two hops", "and")),
    *((f"query_{name}", f"same {other}") for name in ATTRIBUTES for other in ATTRIBUTES if other != name),
    *((f"equal_{name}", form) for name in ATTRIBUTES for form in HOPS),
}


def kind(program: list[dict]) -> tuple[str, str]:
    """Returns the answering function and the form, read from the nodes."""
    functions = [node["function"] for node in program]
    same = [name.replace("_", " ") for name in functions if name.startswith("same_")]
    two = functions[-1].startswith("equal_") or functions[-1] in ("less_than", "greater_than")
    relations = functions.count("relate")
    if same:
        form = same[0]
    elif "intersect" in functions:
        form = "and"
    elif "union" in functions:
        form = "or"
    elif two:  # each side has a hop or neither
        form = HOPS[relations > 0]
    else:
        form = (*HOPS, "two hops")[relations]
    return functions[-1], form


@pytest.fixture(scope="module")
def programs():
    """Programs of a split's questions, as `build_tree` generates them."""
    balance, result = AnswerBalance(), []
    for index in range(60):
        questions = generate_questions(split_scene(0, "train", index), 10, (5, index), balance)
        result += [(question["question_family_index"], question["program"]) for question in questions]
    return result


def test_all_forms_are_asked_and_no_others(programs):
    assert {kind(program) for _, program in programs} == EXPECTED


def test_the_families(programs):
    """Fifty families with equal shares, as assumed by scores by family."""
    assert len(FAMILIES) == len(set(FAMILIES)) == 50
    forms = Counter(family.form for family in FAMILIES)
    assert forms == {"zero": 13, "one": 13, "two": 6, "and": 5, "or": 1, "same": 12}
    for index, program in programs:
        function, form = kind(program)
        assert function == FAMILIES[index].function
        named = {"zero": "no hop", "one": "one hop", "two": "two hops", "same": "same"}
        assert form.startswith(named.get(FAMILIES[index].form, FAMILIES[index].form))


# Scenes.


def picture_of(scene: dict) -> str:
    """Returns a digest of everything that determines image and answers."""
    shown = {name: scene[name] for name in ("objects", "view", "relationships")}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def test_no_scene_of_pretraining_is_one_of_the_task():
    """With the same seed and range of objects, so that only the split's name makes them differ."""
    names = ("pretraining", "pretraining-held-out", "train", "val", "test")
    scenes = {name: {picture_of(split_scene(0, name, i, (3, 5))) for i in range(100)} for name in names}
    assert all(len(result) == 100 for result in scenes.values())
    assert len(set().union(*scenes.values())) == 500
    again = {picture_of(split_scene(0, "val", i, (3, 5))) for i in range(3)}
    assert len(again & scenes["val"]) == 3  # equal scenes have equal digests
