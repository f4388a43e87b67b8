"""Dropout: the share of entries that it keeps, their scale, and masks that depend on keys alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.dropout import example_dropout, fold_in_name, token_keys


@pytest.mark.parametrize(("shape", "rate"), [((64, 1000), 0.1), ((64, 7, 101), 0.5), ((65_536,), 0.25)])
def test_the_share_that_is_kept_and_its_scale(shape, rate):
    y = np.asarray(example_dropout(jnp.ones(shape), rate, jax.random.split(jax.random.key(0), shape[0])))
    kept = y != 0
    assert kept.mean() == pytest.approx(1 - rate, abs=5 * np.sqrt(rate * (1 - rate) / y.size))
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=2**-15)
    if len(shape) > 1:
        assert len(np.unique(kept.reshape(shape[0], -1), axis=0)) == shape[0]  # no two rows share a mask
        # Both halves of a word are independent.
        first, second = kept[..., : shape[-1] // 2], kept[..., -(shape[-1] // 2) :]
        assert (first == second).mean() == pytest.approx((1 - rate) ** 2 + rate**2, abs=0.02)


def test_nothing_is_dropped_at_a_rate_that_rounds_to_zero():
    np.testing.assert_array_equal(example_dropout(jnp.ones((4, 8)), 1e-6, jax.random.split(jax.random.key(0), 4)), 1.0)


def test_masks_depend_on_the_example_and_the_position_alone():
    keys, positions = jax.random.split(jax.random.key(0), 2), jnp.arange(6)
    x = jnp.ones((2, 6, 16))
    whole = example_dropout(x, 0.5, token_keys(keys, jnp.broadcast_to(positions, (2, 6))))
    row = example_dropout(
        x.reshape(1, 12, 16), 0.5, token_keys(jnp.repeat(keys, 6)[None], jnp.tile(positions, 2)[None])
    )
    np.testing.assert_array_equal(row.reshape(2, 6, 16), whole)


def test_a_rows_mask_depends_on_its_key_alone():
    x, keys = jax.random.normal(jax.random.key(0), (4, 5, 6)), jax.random.split(jax.random.key(1), 4)
    together = example_dropout(x, 0.4, keys)
    for row in range(4):
        np.testing.assert_array_equal(example_dropout(x[row : row + 1], 0.4, keys[row : row + 1])[0], together[row])
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_array_equal(example_dropout(x[order], 0.4, keys[order]), together[order])


def test_dropout_in_float16_saturates():
    out = example_dropout(jnp.full((1, 64), 65504, jnp.float16), 0.5, jax.random.split(jax.random.key(0), 1))
    np.testing.assert_array_equal(np.unique(np.asarray(out)), np.asarray([0, 65504], np.float16))


def test_names_and_numbers_fold_into_different_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    folded = [fold_in_name(keys, name) for name in ("decoder/q_proj", "decoder/o_proj", 0, 1)]
    bits = np.concatenate([jax.random.key_data(key) for key in [keys, *folded]])
    assert len(np.unique(bits, axis=0)) == 15
