"""The cache of a process: one value of each kind, and models only while their arrays are alive."""

import gc

import jax
from flax import nnx

from paligemma_jax.tasks.process_cache import LatestCache
from train_jax.core import param_tree


def test_the_latest_value_of_each_kind_is_cached():
    cache, made = LatestCache(), []

    def value(kind, key):
        return cache.get(kind, key, lambda: made.append((kind, key)) or len(made))

    assert [value("a", 1), value("a", 1), value("b", 1), value("a", 1)] == [1, 1, 2, 1]
    assert value("a", 2) == 3 and value("a", 1) == 4  # the second key replaced the first
    assert made == [("a", 1), ("b", 1), ("a", 2), ("a", 1)]


def test_models_share_arrays_while_these_are_alive():
    cache, read = LatestCache(), []

    def model():
        return cache.model("key", lambda: read.append(1) or nnx.Linear(2, 3, rngs=nnx.Rngs(0)))

    first, second = model(), model()
    assert second is not first and len(read) == 1
    shared = param_tree.flatten(second)
    assert all(array is shared[path] for path, array in param_tree.flatten(first).items())
    del first, second, shared
    gc.collect()
    kernel = model().kernel[...]
    assert len(read) == 2
    kernel.delete()  # as a donated array is
    assert isinstance(model().kernel[...], jax.Array) and len(read) == 3
