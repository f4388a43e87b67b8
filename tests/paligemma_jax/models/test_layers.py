"""Layers against plain references and closed forms, in float32 and at Gemma's magnitudes in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.attention import attention, prefix_mask, rotary
from paligemma_jax.models.gemma import Gemma, GemmaConfig
from paligemma_jax.models.norms import LayerNorm, RMSNorm
from paligemma_jax.models.numerics import cast, soft_cap
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.stack import REMAT_POLICIES, make_stack, scan_stack
from train_jax.core import param_tree

pytestmark = pytest.mark.usefixtures("fast_compilation")


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


# Attention.


def plain_attention(q, k, v, mask, scale, cap):
    """One query head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros((B, T, N, v.shape[-1]))
    for b in range(B):
        for n in range(N):
            scores = scale * q[b, :, n] @ k[b, :, n // group].T
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            if mask is not None:
                scores = np.where(mask[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, :, n // group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_one_head_at_a_time(kv_heads, cap, masked):
    q, k, v = normal(0, 2, 5, 6, 4, scale=3.0), normal(1, 2, 7, kv_heads, 4), normal(2, 2, 7, kv_heads, 4)
    mask = None
    if masked:
        mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 5, 7)).at[..., 0].set(True)
    out = attention(q, k, v, mask, scale=0.7, cap=cap)
    np.testing.assert_allclose(out, plain_attention(q, k, v, mask, 0.7, cap), rtol=0, atol=2e-6)


def test_a_query_without_keys_returns_the_mean_of_v():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 3, 2, 4), normal(2, 1, 3, 2, 4)
    out = attention(q, k, v, jnp.zeros((1, 2, 3), bool), scale=0.5)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), out.shape), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_softmax_is_in_float32_whatever_the_dtype(dtype):
    """Scores near 1e4, 1 apart: float16 has steps of 8 there and would call all keys equal."""
    k = jnp.asarray([10_000.0, 10_001.0, 10_002.0]).reshape(1, 3, 1, 1)
    q, v = jnp.ones((1, 1, 1, 2)), jnp.asarray([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1) * jnp.ones((1, 1, 1, 2))
    # Two summands, each exact in the dtype, whose sum is not.
    k = jnp.concatenate([jnp.full_like(k, 8192.0), k - 10_000.0], axis=-1)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    out = attention(q, k, v, None, scale=1.0)
    expected = np.exp([0.0, 1.0, 2.0]) @ [0.0, 1.0, 2.0] / np.exp([0.0, 1.0, 2.0]).sum()
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=1e-2)


def test_soft_cap():
    x = jnp.asarray([-1e4, -1.0, 0.0, 1.0, 1e4])
    np.testing.assert_allclose(soft_cap(x, 30.0), 30.0 * np.tanh(np.asarray(x) / 30.0), rtol=1e-6)
    np.testing.assert_array_equal(soft_cap(x, None), x)


# Rotary positions.


def test_rotary_rotates_pairs_of_the_two_halves():
    x, positions = normal(0, 1, 3, 1, 6), jnp.asarray([[0, 1, 5]])
    out = np.asarray(rotary(x, positions, theta=100.0))[0, :, 0]
    pairs = np.asarray(x)[0, :, 0]
    pairs = pairs[:, :3] + 1j * pairs[:, 3:]
    angle = np.asarray([[0], [1], [5]]) * 100.0 ** -(np.arange(3) / 3)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(out, np.concatenate([expected.real, expected.imag], axis=1), rtol=0, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
    q, k = normal(0, 2, 4, 2, 8), normal(1, 2, 4, 2, 8)
    positions = jnp.asarray([[0, 1, 2, 3], [0, 0, 1, 7]])

    def scores(shift):
        return jnp.einsum(
            "BTNH,BSNH->BNTS",
            rotary(q, positions + shift, 10_000.0),
            rotary(k, positions + shift, 10_000.0),
        )

    np.testing.assert_allclose(scores(1), scores(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores(500), scores(0), rtol=0, atol=1e-3)
    moved = jnp.einsum("BTNH,BSNH->BNTS", rotary(q, positions + 1, 1e4), rotary(k, positions, 1e4))
    assert float(jnp.abs(moved - scores(0)).max()) > 0.1


def test_rotary_angles_are_float32_in_half_precision():
    """Position 4097 is no bfloat16 number: an angle computed there would be off by a whole radian."""
    x, positions = jnp.ones((1, 1, 1, 4)), jnp.asarray([[4097]])
    half = rotary(x.astype(jnp.bfloat16), positions, 10_000.0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rotary(x, positions, 10_000.0), atol=1e-2)


# Norms.


def test_layer_norm_closed_form():
    norm = LayerNorm(4, eps=1e-3)
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.asarray([0.5, 0.0, 0.0, -1.0])
    out = norm(jnp.asarray([[1.0, 3.0, 1.0, 3.0]]))  # mean 2, variance 1
    np.testing.assert_allclose(out, [np.asarray([-1.0, 2.0, -3.0, 4.0]) / np.sqrt(1.001) + [0.5, 0, 0, -1]], rtol=1e-6)


def test_rms_norm_closed_form():
    norm = RMSNorm(2, eps=0.5)
    np.testing.assert_allclose(norm(jnp.asarray([[3.0, 4.0]])), np.asarray([[3.0, 4.0]]) / np.sqrt(13.0), rtol=1e-6)
    norm.scale[...] = jnp.asarray([-1.0, 1.0])  # 1 + w is 0 and 2
    np.testing.assert_allclose(norm(jnp.asarray([[3.0, 4.0]])), np.asarray([[0.0, 8.0]]) / np.sqrt(13.0), rtol=1e-6)


def test_gradients_of_a_layer_norm_are_those_of_its_formula():
    x, scale, bias, cotangent = normal(0, 3, 5, 8) + 1, normal(1, 8), normal(2, 8), normal(3, 3, 5, 8)

    def norm(x, scale, bias):
        layer = LayerNorm(8, eps=0.1)
        layer.scale[...], layer.bias[...] = scale, bias
        return layer(x)

    def formula(x, scale, bias):
        variance = ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 0.1) * scale[None, None] + bias[None, None]

    for one, other in zip(*(jax.vjp(f, x, scale, bias)[1](cotangent) for f in (norm, formula)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_square_in_float32(kind):
    """1e4 squared overflows float16, and in bfloat16 the mean of 4096 squares would lose most of them."""
    x = normal(0, 1, 4096, scale=1e4)
    for dtype in (jnp.float16, jnp.bfloat16):
        out = kind(4096)(x.astype(dtype))
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, kind(4096)(x.astype(dtype).astype(jnp.float32)), rtol=1e-6)


# Casts and projections.


def test_casting_to_float16_saturates():
    x = jnp.asarray([1e6, -1e6, 65504.0, 1.0])
    np.testing.assert_array_equal(cast(x, jnp.float16), np.asarray([65504, -65504, 65504, 1], np.float16))
    faults = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(cast(faults, jnp.float16), np.asarray(faults, np.float16))
    assert cast(x, jnp.float32) is x
    assert cast(x, jnp.bfloat16).dtype == jnp.bfloat16 and bool(jnp.isinf(x.astype(jnp.float16))[0])


@pytest.mark.parametrize(
    "in_shape, out_shape, equation",
    [((6,), (5,), "BTi,io->BTo"), ((6,), (2, 3), "BTi,inh->BTnh"), ((2, 3), (6,), "BTnh,nho->BTo")],
)
def test_projection_contracts_its_input_axes(in_shape, out_shape, equation):
    module = Projection("x", in_shape, out_shape, use_bias=True, rngs=nnx.Rngs(0))
    module.bias[...] = normal(1, *out_shape)
    x = normal(2, 2, 4, *in_shape)
    assert module.kernel.shape == in_shape + out_shape
    expected = np.einsum(equation, x, module.kernel[...]) + np.asarray(module.bias[...])
    np.testing.assert_allclose(module(x), expected, rtol=0, atol=1e-5)


def test_projection_initialises_to_unit_gain():
    module = Projection("x", (8, 64), (256,), rngs=nnx.Rngs(0))
    kernel = module.kernel[...]
    np.testing.assert_allclose([kernel.mean() * 512**0.5, kernel.var() * 512], [0.0, 1.0], atol=0.02)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_projection_computes_in_its_dtype_and_accumulates_in_float32(dtype, tolerance):
    module = Projection("x", (4096,), (3,), use_bias=True, dtype=dtype, rngs=nnx.Rngs(0))
    x = normal(0, 1, 1, 4096, scale=100.0)
    exact = np.asarray(x, np.float64) @ np.asarray(module.kernel[...], np.float64)
    out, wide = module(x), module(x, out_dtype=jnp.float32)
    assert out.dtype == dtype and wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=0, atol=tolerance * 100)
    # A sum above float16's range: float32 leaves hold it, float16 ones saturate.
    module.kernel[...] = jnp.full((4096, 3), 1.0)
    x = jnp.full((1, 1, 4096), 100.0)
    np.testing.assert_allclose(module(x, out_dtype=jnp.float32), 409_600.0, rtol=1e-3)
    if dtype == "float16":
        np.testing.assert_array_equal(module(x), np.full((1, 1, 3), 65504, np.float16))


@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.02), ("bfloat16", 0.1)])
def test_a_decoder_at_gemmas_magnitudes_stays_finite_and_near_float32(make_random, dtype, tolerance):
    """Residuals near 1e4 and beyond, with one huge feature, as trained Gemma has."""
    sizes = dict(vocab_size=32, width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16)
    exact = make_random(nnx.eval_shape(lambda: Gemma(GemmaConfig(**sizes), rngs=nnx.Rngs(0))))
    _, arrays = param_tree.split(exact)
    # Feed-forward branches add about 1e4 to the residual stream.
    arrays["layers/mlp/down_proj/kernel"] = arrays["layers/mlp/down_proj/kernel"] * 2e4
    half = nnx.eval_shape(lambda: Gemma(GemmaConfig(**sizes, dtype=dtype), rngs=nnx.Rngs(0)))
    x = normal(1, 2, 6, 64, scale=1e4).at[..., 5].set(3e5)  # beyond float16
    positions = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
    mask = jnp.ones((2, 6, 6), bool)

    @jax.jit
    def run(arrays):
        results = []
        for model in (exact, half):
            hidden, _, out = param_tree.merge(nnx.graphdef(model), arrays)(x, positions, mask)
            results.append((hidden, out["encoded"]))
        return results

    (expected, encoded), (hidden, half_encoded) = run(arrays)
    assert float(jnp.abs(encoded).max()) > 1e5 and float(jnp.median(jnp.abs(encoded))) > 1e4
    assert hidden.dtype == half_encoded.dtype == jnp.float32
    assert bool(jnp.isfinite(hidden).all()) and bool(jnp.isfinite(half_encoded).all())
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=tolerance)


# Masks.


@pytest.mark.parametrize(
    "mask_ar, rows",
    [
        ([1, 1, 1, 1], ["1000", "1100", "1110", "1111"]),
        ([0, 0, 0, 0], ["1111", "1111", "1111", "1111"]),
        ([0, 0, 1, 1], ["1100", "1100", "1110", "1111"]),
        ([1, 0, 1, 0], ["1100", "1100", "1111", "1111"]),
    ],
    ids=["causal", "full", "prefix", "blocks"],
)
def test_prefix_mask_rows(mask_ar, rows):
    out = prefix_mask(jnp.ones((1, 4), bool), jnp.asarray([mask_ar]))[0]
    np.testing.assert_array_equal(out, [[digit == "1" for digit in row] for row in rows])


def test_padding_neither_attends_nor_is_attended_to():
    out = prefix_mask(jnp.asarray([[True, False, True, True]]), jnp.asarray([[0, 0, 0, 1]]))[0]
    expected = ["1010", "0000", "1010", "1011"]
    np.testing.assert_array_equal(out, [[digit == "1" for digit in row] for row in expected])


def test_prefix_mask_equals_big_visions_cases(big_vision_case):
    mask_input, mask_ar = (jnp.asarray(big_vision_case[f"mask_case_{name}"]) for name in ("input", "ar"))
    np.testing.assert_array_equal(prefix_mask(mask_input, mask_ar), big_vision_case["mask_case_attn"])


# Stacks.


def run_stack(stack, graph, remat="none", unroll=False, *, x):
    def call(block, carry, scale):
        y = jnp.tanh(block(carry)) * scale
        return y, y.sum()

    return scan_stack(nnx.merge(graph, stack), call, x, jnp.asarray([1.0, 0.5, 2.0]), remat=remat, unroll=unroll)


@pytest.fixture(scope="module")
def stack():
    module = make_stack(lambda rngs: Projection("x", (4,), (4,), use_bias=True, rngs=rngs), 3, nnx.Rngs(0))
    return nnx.split(module)


def test_a_stack_runs_its_layers_in_order(stack):
    graph, arrays = stack
    kernels = arrays["kernel"][...]
    assert kernels.shape == (3, 4, 4) and not np.array_equal(kernels[0], kernels[1])
    x = expected = normal(1, 2, 4)
    sums = []
    for kernel, scale in zip(kernels, (1.0, 0.5, 2.0), strict=True):
        expected = jnp.tanh(expected @ kernel) * scale
        sums.append(expected.sum())
    out, each = run_stack(arrays, graph, x=x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(each, sums, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("remat", "unroll"), [(each, False) for each in REMAT_POLICIES] + [("none", True), ("block", True)]
)
def test_remat_and_unroll_change_neither_values_nor_gradients(stack, remat, unroll):
    graph, arrays = stack
    x = normal(1, 2, 4)
    value_and_grad = jax.value_and_grad(lambda a, *how: (run_stack(a, graph, *how, x=x)[0] ** 2).sum())
    value, gradients = value_and_grad(arrays, "none", False)
    other_value, other_gradients = value_and_grad(arrays, remat, unroll)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    # Sums of numbers up to 2 in another order: some of their last bits (1e-7 fails on processors with AVX-512).
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_gradients, gradients)


def test_remat_recomputes(stack):
    """The backward pass of a rematerialised block runs its matrix product again, that of "none" does not."""
    graph, arrays = stack
    x = normal(1, 2, 4)

    def products(remat):
        loss = lambda a: (run_stack(a, graph, remat, x=x)[0] ** 2).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(arrays)).count("dot_general")

    assert products("block") > products("none") == products("dots")


def test_an_unknown_remat_is_refused(stack):
    graph, arrays = stack
    with pytest.raises(ValueError, match="remat is 'all', expected one of none, block, dots"):
        run_stack(arrays, graph, "all", x=normal(1, 2, 4))
