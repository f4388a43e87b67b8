"""Linear 4-bit integers by blocks: what is exact, and the bound of its rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.adapt.quantization.int4 import Int4
from train_jax.core.errors import UserError


def round_trip(w, block_size=64):
    codec = Int4(block_size)
    return np.asarray(codec.decode(codec.encode(jnp.asarray(w)), w.shape))


@pytest.mark.parametrize("shape", [(8, 64), (37, 51), (3, 72), (1, 5)])
def test_error_is_half_a_step_and_the_ends_are_exact(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 3  # a range without zero
    got = round_trip(w).reshape(-1)
    for start in range(0, w.size, 64):
        block, new = w.reshape(-1)[start : start + 64], got[start : start + 64]
        step = (block.max() - block.min()) / 15
        assert np.abs(new - block).max() <= 0.5 * step + 1e-6
        np.testing.assert_allclose(new[[block.argmin(), block.argmax()]], [block.min(), block.max()], rtol=1e-6)


def test_evenly_spaced_and_constant_blocks_are_exact():
    w = np.concatenate([np.arange(64) % 16 - 4, np.full(64, 7.0)]).astype(np.float32).reshape(2, 64)
    np.testing.assert_allclose(round_trip(w), w, atol=1e-6)


def test_refuses_block_sizes():
    with pytest.raises(UserError, match=r"block size of int4 is 100, expected 64 or 128"):
        Int4(100)
