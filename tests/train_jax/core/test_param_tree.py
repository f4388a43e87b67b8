"""A module as a flat dictionary of arrays by path, and back."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from train_jax.core import param_tree


class Stack(nnx.Module):
    """Twelve layers of equal shape in a list."""

    def __init__(self):
        self.layers = nnx.List([nnx.Param(jnp.float32(number)) for number in range(12)])
        self.last = nnx.Dict(scale=nnx.Param(jnp.float32(-1)))


def test_lists_of_more_than_ten_keep_their_order():
    """Sorted as text, "10" precedes "2", and layers of equal shape would be permuted without an error."""
    graph, arrays = param_tree.split(Stack())
    assert arrays["layers/10"] == 10 and arrays["last/scale"] == -1
    for order in (sorted(arrays), sorted(arrays, reverse=True)):
        again = param_tree.merge(graph, {path: arrays[path] for path in order})
        np.testing.assert_array_equal([layer[...] for layer in again.layers], np.arange(12))
        assert again.last["scale"][...] == -1
