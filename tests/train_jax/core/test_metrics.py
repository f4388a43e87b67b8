import math

import jax
import jax.numpy as jnp
import pytest

from train_jax.core import metrics


def pair(value, count):
    return jnp.float32(value), jnp.float32(count)


def test_mean_over_unequal_batches_weighs_every_example_once():
    total = metrics.add({"loss": pair(6.0, 3)}, {"loss": pair(10.0, 1)})
    assert metrics.means(total) == {"loss": 4.0}  # not the mean of the means, which is 6


def test_zeros_are_neutral_and_work_as_a_scan_carry():
    batches = {"loss": (jnp.arange(4.0), jnp.ones(4)), "accuracy": (jnp.array([1.0, 0.0, 2.0, 1.0]), jnp.full(4, 2.0))}
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    start = metrics.zeros_like(jax.eval_shape(lambda: first))
    assert metrics.means(metrics.add(start, first)) == metrics.means(first)

    total, _ = jax.lax.scan(lambda carry, batch: (metrics.add(carry, batch), None), start, batches)
    assert metrics.means(total) == {"loss": 1.5, "accuracy": 0.5}


def test_add_refuses_different_names():
    loss, accuracy = {"loss": pair(2.0, 2)}, {"accuracy": pair(1.0, 4)}
    with pytest.raises(ValueError, match=r"\['loss'\] and \['accuracy'\]"):
        metrics.add(loss, accuracy)


def test_the_mean_of_nothing_is_nan():
    assert math.isnan(metrics.means({"accuracy": pair(0.0, 0)})["accuracy"])
