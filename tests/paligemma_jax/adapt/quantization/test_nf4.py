"""NF4: bit parity with bitsandbytes, error compared with linear 4-bit integers, and user errors."""

import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.adapt.quantization import dynamic_map
from paligemma_jax.adapt.quantization.int4 import Int4
from paligemma_jax.adapt.quantization.nf4 import LEVELS, NF4
from train_jax.core.errors import UserError


@pytest.fixture(scope="module")
def stored(golden):
    return dict(np.load(golden / "bnb_quant/bases.npz"))


# Parity with bitsandbytes, exact.


@pytest.mark.parametrize(
    "name, block_size",
    [*((name, size) for name in ("gauss", "outlier", "odd", "rank3") for size in (64, 128)), ("bf16", 64)],
)
def test_codes_and_constants_equal_bitsandbytes(stored, name, block_size):
    case = f"nf4/{name}/bs{block_size}/"
    w = stored[f"nf4/{name}/w"]
    codes, absmax = pg.nf4.quantize(w, block_size)
    np.testing.assert_array_equal(codes, stored[case + "packed"])
    np.testing.assert_array_equal(absmax, stored[case + "absmax"])
    dequantized = np.asarray(pg.nf4.dequantize(codes, absmax, w.shape))
    if name == "bf16":
        dequantized = dequantized.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(dequantized, stored[case + "dequant"])


def test_levels_equal_bitsandbytes(stored):
    np.testing.assert_array_equal(LEVELS, stored["nf4/code"])
    np.testing.assert_array_equal(dynamic_map.levels(signed=True), stored["dyn/map_signed"])
    np.testing.assert_array_equal(dynamic_map.levels(signed=False), stored["dyn/map_unsigned"])


def test_double_quantisation_equals_bitsandbytes(stored):
    codec = NF4(64, double=True)
    w = stored["nf4dq/w"]
    arrays = codec.encode(jnp.asarray(w))
    np.testing.assert_array_equal(arrays["codes"].reshape(-1), stored["nf4dq/packed"])
    np.testing.assert_array_equal(arrays["absmax"].reshape(-1), stored["nf4dq/absmax_u8"])
    np.testing.assert_allclose(arrays["nested_absmax"], stored["nf4dq/nested_absmax"], rtol=1e-6)
    np.testing.assert_allclose(arrays["offset"], stored["nf4dq/offset"], rtol=1e-6)
    expected = LEVELS[np.stack([stored["nf4dq/packed"] >> 4, stored["nf4dq/packed"] & 15], -1)].reshape(-1, 64)
    expected = expected * stored["nf4dq/absmax_dequant"][:, None]
    np.testing.assert_allclose(codec.decode(arrays, w.shape).reshape(-1, 64), expected, rtol=1e-6)


# Closed forms and limits.


def test_levels_times_the_largest_magnitude_come_back_as_they_are():
    w = np.concatenate([LEVELS, LEVELS[::-1], np.zeros(32, np.float32)]) * np.float32(0.5)
    codes, absmax = pg.nf4.quantize(w)
    assert absmax.tolist() == [0.5]
    np.testing.assert_array_equal(pg.nf4.dequantize(codes, absmax, w.shape), w)


def test_zeros_and_denormals_are_zero_and_a_nan_stays_in_its_block():
    w = np.zeros(192, np.float32)
    w[:64] = 1e-42
    w[130] = np.nan
    codes, absmax = pg.nf4.quantize(w)
    assert (np.asarray(codes[:64]) == 0x77).all()
    dequantized = np.asarray(pg.nf4.dequantize(codes, absmax, w.shape))
    assert (np.abs(dequantized[:128]) < 1e-37).all() and np.isnan(dequantized[128:]).all()


def test_odd_count_pads_the_last_nibble_with_zero_s_code():
    codes, absmax = pg.nf4.quantize(np.full(3, -2.0, np.float32))
    assert codes.tolist() == [0x00, 0x07] and absmax.tolist() == [2.0]


def relative_errors(codec, w):
    difference = np.asarray(codec.decode(codec.encode(jnp.asarray(w)), w.shape)) - w
    return np.sqrt(np.mean(difference**2)) / w.std(), np.abs(difference).mean() / w.std()


def test_error_on_normal_weights_beside_linear_int4():
    """At equal bits NF4 has the smaller error in both measures; at equal block size int4 takes half a bit more."""
    w = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    nf4, wide, equal_bits, equal_block = (
        relative_errors(codec, w) for codec in (NF4(64), NF4(128), Int4(128), Int4(64))
    )
    np.testing.assert_allclose(nf4, (0.0920, 0.0728), rtol=0.01)
    assert nf4[0] < 0.95 * equal_bits[0] and nf4[1] < 0.9 * equal_bits[1]
    assert nf4[1] < 0.97 * equal_block[1]
    assert nf4[0] < wide[0] < equal_bits[0] and wide[1] < 0.95 * equal_bits[1]


def test_double_quantisation_costs_next_to_nothing():
    w = np.random.default_rng(1).standard_normal((512, 1024)).astype(np.float32)
    plain, double = relative_errors(NF4(64), w), relative_errors(NF4(64, double=True), w)
    assert plain[0] < double[0] < 1.01 * plain[0]
    size = sum(array.nbytes for array in NF4(64, double=True).encode(jnp.asarray(w)).values())
    assert 8 * size / w.size == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)


# Refusals.


def test_refuses_block_sizes_and_shapes_in_one_sentence():
    with pytest.raises(UserError, match=r"block size of nf4 is 48, expected 64 or 128"):
        pg.nf4.quantize(np.zeros(10, np.float32), 48)
    codes, absmax = pg.nf4.quantize(np.zeros(200, np.float32))
    with pytest.raises(UserError, match=r"100 bytes of NF4 codes and 4 block constants .* shape \(201,\)"):
        pg.nf4.dequantize(codes, absmax, (201,))
