"""8-bit integers by output channel: parity with bitsandbytes in training and in evaluation, and the outlier split."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.adapt.quantization.int8 import Int8PerChannel, split_product


@pytest.fixture(scope="module")
def stored(golden):
    return dict(np.load(golden / "bnb_quant/bases.npz"))


@pytest.fixture(scope="module")
def weights(stored):
    return Int8PerChannel().encode(jnp.asarray(stored["int8/W"]))


def test_codes_and_constants_equal_bitsandbytes(stored, weights):
    difference = np.abs(np.asarray(weights["codes"], int) - stored["int8/W_codes"])
    assert difference.max() <= 1 and difference.mean() <= 5e-4
    np.testing.assert_array_equal(weights["channel_absmax"], stored["int8/W_row_absmax"])


def test_training_product_equals_bitsandbytes(stored, weights):
    matrix = Int8PerChannel().decode(weights, stored["int8/W"].shape)
    y = stored["int8/x"] @ np.asarray(matrix).T
    np.testing.assert_allclose(y, stored["int8/linear8bitlt_train_fp32/y"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name, threshold", [("thr0", math.inf), ("thr6", 6.0)])
@pytest.mark.parametrize("precision, atol", [("fp32", 2e-4), ("fp16", 2e-3)])
def test_evaluation_product_equals_bitsandbytes(stored, weights, name, threshold, precision, atol):
    dtype = {"fp32": jnp.float32, "fp16": jnp.float16}[precision]
    x = jnp.asarray(stored["int8/x"], dtype)[None]  # one example of nine rows: the golden looks over all of them
    y = split_product(weights, x, threshold)[0].astype(dtype)
    expected = stored[f"int8/linear8bitlt_eval_{name}_{precision}/y"]
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=atol)


def test_the_split_keeps_what_rounding_by_the_largest_input_loses(stored, weights):
    """The point of the split: with outliers in their own product, the small inputs keep their precision."""
    exact = stored["int8/x"] @ np.asarray(Int8PerChannel().decode(weights, stored["int8/W"].shape)).T
    x = jnp.asarray(stored["int8/x"])[None]
    split, whole = (np.abs(np.asarray(split_product(weights, x, t)[0]) - exact).max() for t in (6.0, math.inf))
    assert split < 0.5 * whole


def test_an_example_does_not_depend_on_its_batch_mates(stored, weights):
    x = jnp.asarray(stored["int8/x"]).reshape(3, 3, -1)
    together = split_product(weights, x, 6.0)
    for row in range(3):
        np.testing.assert_array_equal(together[row], split_product(weights, x[row : row + 1], 6.0)[0])


def test_zero_rows_are_zero(weights):
    assert not np.asarray(split_product(weights, jnp.zeros((2, 1, 128)), 6.0)).any()
    zero = Int8PerChannel().encode(jnp.zeros((4, 8)))
    assert not np.asarray(Int8PerChannel().decode(zero, (4, 8))).any()
