from typing import NamedTuple

import jax
import numpy as np
import pytest

from train_jax.checkpoints.trees import differences, flatten, unflatten


class Moments(NamedTuple):
    mu: dict
    count: np.ndarray


TREE = (Moments({"a/b": np.float32(1), "c": np.float32(2)}, np.int32(3)), {"guard": [np.int32(4)]})


def test_flatten_and_unflatten_are_inverses():
    flat = flatten(TREE)
    assert flat == {"0/mu/a/b": 1, "0/mu/c": 2, "0/count": 3, "1/guard/0": 4}
    again = unflatten(dict(reversed(flat.items())), jax.tree.map(np.zeros_like, TREE))  # by name, not by place
    assert again == TREE and isinstance(again[0], Moments)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves .* have the same path"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_differences_are_described():
    saved = {"same": np.zeros(2), "shape": np.zeros(2), "dtype": np.zeros(2), "gone": np.zeros(())}
    wanted = {"same": np.ones(2), "shape": np.zeros(3), "dtype": np.zeros(2, np.int8), "new": np.zeros((1, 2))}
    assert differences(saved, wanted, "params") == [
        "params: dtype is float64[2] there and int8[2] here",
        "params: gone is float64[] there and absent here",
        "params: new is absent there and float64[1, 2] here",
        "params: shape is float64[2] there and float64[3] here",
    ]
