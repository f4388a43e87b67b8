"""The order of examples against grain's, which computes one index at a time."""

import grain
import numpy as np
import pytest

from train_jax.data.shuffle import Order

# Sizes near powers of two, where a block has two more bits, and 1.
SIZES = (1, 2, 3, 23, 256, 65_535, 65_536, 65_538, 200_000, 2**17 + 1, 2**31, 3 * 10**9)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
@pytest.mark.parametrize("size", SIZES)
def test_the_order_is_that_of_grain(size, seed):
    reference = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    places = np.r_[np.arange(40), size - 1, size, size + 1, 3 * size + np.arange(20)]
    result = Order(size, seed).at(places)
    assert result.dtype == np.int64 and result.tolist() == [int(reference[int(place)]) for place in places]


@pytest.mark.parametrize("size", [1, 300, 65_537])
def test_every_epoch_is_a_permutation(size):
    stream = Order(size, 1).at(np.arange(3 * size).reshape(3, size))
    assert (np.sort(stream, axis=1) == np.arange(size)).all()


def test_without_a_seed_it_is_the_order_of_the_numbers():
    assert Order(5, None).at(np.array([[0, 4], [5, 12]])).tolist() == [[0, 4], [0, 2]]
