"""Executes CLEVR's functional programs on a scene (Johnson et al. 2017, section 3 and figure 2).

A program is the official JSON: a list of nodes {"function", "inputs", "value_inputs"} in evaluation order, where
`inputs` are indices of earlier nodes; the official generator's own spelling ("type", "side_inputs") is read too.
Values between nodes are sorted tuples of object indices, single indices, integers, booleans and attribute words.
"""

from typing import Any

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES

Value = tuple[int, ...] | int | bool | str


class InvalidProgram(ValueError):
    """The program has no answer on this scene: `unique` was applied to none or several objects."""


def execute(program: list[dict[str, Any]], scene: dict) -> Value:
    """Returns the value of the last node. Raises InvalidProgram or, for an unknown function, KeyError."""
    values: list[Value] = []
    for node in program:
        function = node.get("function") or node["type"]
        constants = node.get("value_inputs") or node.get("side_inputs") or []
        values.append(_FUNCTIONS[function](scene, *(values[i] for i in node["inputs"]), *constants))
    return values[-1]


def answer(program: list[dict[str, Any]], scene: dict) -> str:
    """Returns the value of `execute` as CLEVR spells answers: yes, no, 0..10 or an attribute word."""
    value = execute(program, scene)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def last_function(program: list[dict[str, Any]]) -> str:
    """Returns the function that gives the answer and names the question's type: "count", "query_color", ..."""
    return program[-1].get("function") or program[-1]["type"]


def _unique(scene: dict, objects: tuple[int, ...]) -> int:
    if len(objects) != 1:
        raise InvalidProgram(f"unique found {len(objects)} objects in {scene.get('image_filename') or 'the scene'}.")
    return objects[0]


def _filter(attribute: str):
    def keep(scene: dict, objects: tuple[int, ...], word: str) -> tuple[int, ...]:
        return tuple(i for i in objects if scene["objects"][i][attribute] == word)

    return keep


def _query(attribute: str):
    return lambda scene, index: scene["objects"][index][attribute]


def _same(attribute: str):
    def others(scene: dict, index: int) -> tuple[int, ...]:
        word = scene["objects"][index][attribute]
        return tuple(i for i, item in enumerate(scene["objects"]) if i != index and item[attribute] == word)

    return others


def _equal(scene: dict, first: Value, second: Value) -> bool:
    return first == second


_FUNCTIONS = {
    "scene": lambda scene: tuple(range(len(scene["objects"]))),
    "unique": _unique,
    "relate": lambda scene, index, relation: tuple(sorted(scene["relationships"][relation][index])),
    "intersect": lambda scene, a, b: tuple(sorted(set(a) & set(b))),
    "union": lambda scene, a, b: tuple(sorted(set(a) | set(b))),
    "count": lambda scene, objects: len(objects),
    "exist": lambda scene, objects: bool(objects),
    "equal_integer": _equal,
    "less_than": lambda scene, a, b: a < b,
    "greater_than": lambda scene, a, b: a > b,
    **{f"filter_{name}": _filter(name) for name in ATTRIBUTES},
    **{f"query_{name}": _query(name) for name in ATTRIBUTES},
    **{f"same_{name}": _same(name) for name in ATTRIBUTES},
    **{f"equal_{name}": _equal for name in ATTRIBUTES},
}
