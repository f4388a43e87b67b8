"""The program engine on a scene small enough to answer by hand."""

import pytest

from paligemma_jax.data.synthetic_clevr import InvalidProgram, answer, execute, last_function

# From left to right, and each farther away than the one before it.
OBJECTS = [
    {"size": "large", "color": "red", "material": "rubber", "shape": "cube"},
    {"size": "small", "color": "red", "material": "metal", "shape": "sphere"},
    {"size": "small", "color": "blue", "material": "metal", "shape": "cube"},
    {"size": "large", "color": "green", "material": "metal", "shape": "cube"},
]
SCENE = {
    "objects": OBJECTS,
    "relationships": {
        "left": [[], [0], [0, 1], [0, 1, 2]],
        "right": [[1, 2, 3], [2, 3], [3], []],
        "front": [[], [0], [0, 1], [0, 1, 2]],
        "behind": [[1, 2, 3], [2, 3], [3], []],
    },
}


def build(*nodes):
    """("filter_color", "red") or ("count",) continue from the node before; integers name other inputs."""
    out = []
    for at, (function, *rest) in enumerate(nodes):
        inputs = [value for value in rest if isinstance(value, int)] or ([at - 1] if function != "scene" else [])
        out.append({"function": function, "inputs": inputs, "value_inputs": [v for v in rest if isinstance(v, str)]})
    return out


RED_SPHERE = (("scene",), ("filter_color", "red"), ("filter_shape", "sphere"), ("unique",))  # nodes 0..3, object 1


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((("scene",), ("count",)), "4"),
        ((("scene",), ("filter_shape", "cube"), ("count",)), "3"),
        ((("scene",), ("filter_color", "yellow"), ("exist",)), "no"),
        ((("scene",), ("filter_material", "metal"), ("filter_size", "large"), ("exist",)), "yes"),
        ((*RED_SPHERE, ("relate", "right"), ("filter_shape", "cube"), ("count",)), "2"),
        ((*RED_SPHERE, ("relate", "left"), ("unique",), ("query_size",)), "large"),
        ((*RED_SPHERE, ("query_material",)), "metal"),
        ((*RED_SPHERE, ("same_size",), ("unique",), ("query_color",)), "blue"),
        ((*RED_SPHERE, ("same_material",), ("count",)), "2"),
        ((*RED_SPHERE, ("same_color",), ("unique",), ("query_shape",)), "cube"),
        ((*RED_SPHERE, ("same_shape",), ("exist",)), "no"),
        ((*RED_SPHERE, ("relate", "behind"), ("relate", 3, "right"), ("union", 4, 5), ("count",)), "2"),
        (
            (
                ("scene",),
                ("filter_color", "red"),
                ("scene",),
                ("filter_shape", "cube"),
                ("intersect", 1, 3),
                ("count",),
            ),
            "1",
        ),
        ((("scene",), ("filter_color", "red"), ("scene",), ("filter_shape", "cube"), ("union", 1, 3), ("count",)), "4"),
        ((("scene",), ("count",), ("scene",), ("filter_color", "red"), ("count",), ("greater_than", 1, 4)), "yes"),
        ((("scene",), ("count",), ("scene",), ("filter_color", "red"), ("count",), ("less_than", 1, 4)), "no"),
        ((("scene",), ("count",), ("scene",), ("count",), ("equal_integer", 1, 3)), "yes"),
        (
            (
                *RED_SPHERE,
                ("query_color",),
                ("scene",),
                ("filter_color", "blue"),
                ("unique",),
                ("query_color",),
                ("equal_color", 4, 8),
            ),
            "no",
        ),
        (
            (
                *RED_SPHERE,
                ("query_size",),
                ("scene",),
                ("filter_color", "blue"),
                ("unique",),
                ("query_size",),
                ("equal_size", 4, 8),
            ),
            "yes",
        ),
    ],
)
def test_known_answers(nodes, expected):
    assert answer(build(*nodes), SCENE) == expected


@pytest.mark.parametrize("color", ["red", "yellow"])  # two, none
def test_a_referent_must_be_unique(color):
    with pytest.raises(InvalidProgram, match="unique found [20] objects"):
        execute(build(("scene",), ("filter_color", color), ("unique",), ("query_shape",)), SCENE)


def test_the_generators_own_spelling_is_read():
    nodes = [
        {"type": "scene", "inputs": []},
        {"type": "filter_color", "inputs": [0], "side_inputs": ["red"]},
        {"type": "count", "inputs": [1]},
    ]
    assert answer(nodes, SCENE) == "2" and last_function(nodes) == "count"
