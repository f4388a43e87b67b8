"""Layout of blocks and nibbles: groups hold whole rows and whole blocks, and the order in memory is the flat one."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.adapt.quantization import blocks


@pytest.mark.parametrize(
    "rows, columns, block, expected",
    [
        (16384, 2048, 64, 16384),  # Gemma's gate_proj: a row is 32 blocks
        (1152, 4304, 64, 288),  # SigLIP's fc2: 4 rows are 269 blocks
        (1152, 4304, 128, 144),
        (8, 72, 64, 1),  # 8 rows are 9 blocks, and there are just 8
        (16, 72, 64, 2),
        (37, 51, 64, 1),  # no number of whole rows below 64 is whole blocks
    ],
)
def test_groups(rows, columns, block, expected):
    assert blocks.num_groups(rows, columns, block) == expected


@pytest.mark.parametrize(
    "rows, columns, block", [(1, 1, 64), (5, 51, 64), (3, 128, 64), (8, 72, 64), (7, 72, 64), (12, 96, 128)]
)
def test_blocks_are_consecutive_in_the_flat_matrix(rows, columns, block):
    flat = np.arange(rows * columns, dtype=np.float32) + 1
    split = np.asarray(blocks.split(jnp.asarray(flat.reshape(rows, columns)), block, "constant"))
    assert split.shape[0] == blocks.num_groups(rows, columns, block)
    np.testing.assert_array_equal(split.reshape(-1)[: flat.size], flat)
    assert not split.reshape(-1)[flat.size :].any()
    count = flat.size // split.shape[0]
    constants = np.asarray(blocks.repeat_per_weight(jnp.asarray(split[:, :, 0]), block, count)).reshape(-1)
    np.testing.assert_array_equal(constants, (flat - 1) // block * block + 1)


@pytest.mark.parametrize("count", [128, 100, 99, 65])
def test_nibbles_high_first_and_back(count):
    codes = np.random.default_rng(0).integers(0, 16, (3, 2, 64)).astype(np.uint8)
    packed = np.asarray(blocks.pack(jnp.asarray(codes), count))
    flat = codes.reshape(3, -1)
    assert packed.shape == (3, (count + 1) // 2)
    np.testing.assert_array_equal(packed[:, 5], flat[:, 10] * 16 + flat[:, 11])
    np.testing.assert_array_equal(blocks.unpack(jnp.asarray(packed), count), flat[:, :count])
