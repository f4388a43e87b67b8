"""Masks stored by token, and flash attention beside the plain one; the TPU's kernel runs in an interpreter."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_jax.models import encoder_block, numerics
from paligemma_jax.models.attention import (
    attention,
    block_mask,
    dispatch,
    gpu,
    has_flash,
    has_short,
    partition,
    prefix_lm_mask,
    short,
    short_attention,
    tpu,
)
from paligemma_jax.models.attention.plain import plain_attention
from paligemma_jax.models.gemma import sliding_mask
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.vit import ViTConfig
from tests.paligemma_jax.mini import MINI
from train_jax.core import devices, param_tree, row_sharding
from train_jax.parallel.sharding import make_mesh

# Rows of (start, prefix, suffix): the second example of a row follows the first, with padding around them.
PACKED = [[(2, 100, 30), (132, 60, 70)], [(0, 40, 80), (125, 90, 20)]]
LENGTH = 270


def packed(rows=PACKED, length=LENGTH):
    """Returns segment, prefix and positions of packed rows, [B, T]."""
    segment, prefix, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for row, examples in enumerate(rows):
        for number, (start, before, after) in enumerate(examples):
            segment[row, start : start + before + after] = number + 1
            prefix[row, start : start + before] = 1
            positions[row, start : start + before + after] = np.arange(before + after)
    return jnp.asarray(segment), jnp.asarray(prefix.astype(bool)), jnp.asarray(positions)


def described(segment, prefix):
    """The mask as the words say: a key of the query's example that is not behind it, or belongs to the prefix."""
    segment, prefix = np.asarray(segment), np.asarray(prefix)
    index = np.arange(segment.shape[1])
    same = (segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] > 0)
    return same & ((index[None, None, :] <= index[None, :, None]) | prefix[:, None, :])


# Masks.


def test_a_packed_mask_is_that_of_its_description():
    segment, prefix, _ = packed()
    np.testing.assert_array_equal(prefix_lm_mask(segment, prefix).dense(), described(segment, prefix))


def test_segments_may_interleave():
    """Two images before their two texts, as [image 1][image 2][text 1][text 2]."""
    segment = jnp.asarray([[1, 1, 2, 2, 1, 1, 1, 2, 2, 0]])
    prefix = jnp.asarray([[1, 1, 1, 1, 1, 0, 0, 1, 0, 0]], bool)
    np.testing.assert_array_equal(prefix_lm_mask(segment, prefix).dense(), described(segment, prefix))


@pytest.mark.parametrize("seed", range(3))
def test_a_block_mask_is_the_rule_of_big_vision(seed):
    rng = np.random.default_rng(seed)
    real, mask_ar = jnp.asarray(rng.random((3, 12)) < 0.8), jnp.asarray(rng.integers(0, 2, (3, 12)))
    block = np.cumsum(mask_ar, axis=1)
    expected = (block[:, None, :] <= block[:, :, None]) & real[:, None, :] & real[:, :, None]
    np.testing.assert_array_equal(block_mask(real, mask_ar).dense(), expected)


def test_a_window_of_ranges_is_the_window_of_a_dense_mask():
    segment, prefix, positions = packed()
    mask = prefix_lm_mask(segment, prefix)
    expected = sliding_mask(mask.dense(), positions, positions, 25)
    assert (np.asarray(expected) != np.asarray(mask.dense())).any()
    np.testing.assert_array_equal(mask.windowed(positions, 25).dense(), expected)


# Kernels.


def inputs(heads, keys, width, dtype=jnp.float32, length=LENGTH):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, length, n, width)), dtype) for n in (heads, keys, keys, heads))


def values_and_gradients(kernel, arrays, mask, real, **options):
    """Returns the outputs at real tokens, and the gradients of q, k and v when padding has none."""

    def run(q, k, v):
        return attention(q, k, v, mask, scale=0.3, kernel=kernel, **options) * real.astype(q.dtype)

    @jax.jit
    def call(q, k, v, cotangent):
        out, backward = jax.vjp(run, q, k, v)
        return out, *backward(cotangent)

    return [np.asarray(array, np.float32) for array in call(*arrays)]


def assert_flash_is_plain(arrays, mask, real, tolerance=2e-5, **options):
    expected = values_and_gradients("plain", arrays, mask, real, **options)
    for flash, plain in zip(values_and_gradients("flash", arrays, mask, real, **options), expected, strict=True):
        np.testing.assert_allclose(flash, plain, atol=tolerance * np.abs(plain).max())


@pytest.fixture
def several_blocks(monkeypatch):
    """Blocks of 128 tokens, so that short sequences have several."""
    monkeypatch.setattr(tpu, "_LARGEST_BLOCK", 128)


def packed_inputs(window=None):
    segment, prefix, positions = packed()
    mask = prefix_lm_mask(segment, prefix)
    real = (segment > 0)[:, :, None, None]
    return (mask if window is None else mask.windowed(positions, window)), real


@pytest.mark.parametrize("length", [300, 256], ids=["padded", "whole blocks"])
def test_all_tokens_see_all(several_blocks, length):
    """As in SigLIP's tower, with heads of width 72."""
    assert_flash_is_plain(inputs(2, 2, 72, length=length), None, jnp.ones((1, 1, 1, 1)))


@pytest.mark.parametrize("once", [True, False], ids=["one backward kernel", "two"])
@pytest.mark.parametrize(("keys", "cap"), [(1, None), (2, 2.0)], ids=["one key head", "groups and soft cap"])
def test_packed_examples(several_blocks, monkeypatch, keys, cap, once):
    if not once:
        monkeypatch.setattr(tpu, "_ONE_BACKWARD", 0)
    assert_flash_is_plain(inputs(4, keys, 16), *packed_inputs(), cap=cap)


def test_a_sliding_window(several_blocks):
    assert_flash_is_plain(inputs(2, 1, 16), *packed_inputs(window=40))


def test_wide_heads_in_bfloat16(several_blocks):
    assert_flash_is_plain(inputs(2, 1, 256, jnp.bfloat16), *packed_inputs(), tolerance=0.02)


@pytest.mark.parametrize("length", [1, 128, 129, 512, 513, 767, 1536, 4096, 4223, 4607])
def test_lengths_are_padded_to_whole_blocks(length):
    padded, size = tpu.padded_length(length)
    assert padded % size == 0 and size % tpu.LANES == 0 and 0 <= padded - length < 2 * tpu.LANES


@pytest.mark.parametrize(
    ("mesh", "heads", "keys"),
    [({"data": 2, "fsdp": 1, "tensor": 2}, 4, 1), ({"data": 1, "fsdp": 2, "tensor": 2}, 4, 2)],
    ids=["one key head for all", "key heads split"],
)
def test_rows_and_heads_are_split_over_the_mesh(several_blocks, mesh, heads, keys):
    mask, real = packed_inputs()
    arrays = inputs(heads, keys, 16)
    expected = values_and_gradients("plain", arrays, mask, real)
    on_mesh = make_mesh(mesh, jax.devices()[:4])
    rows = NamedSharding(on_mesh, PartitionSpec(row_sharding.ROW_AXES))

    def run(*arrays):
        q, k, v, cotangent = arrays
        out, backward = jax.vjp(lambda *qkv: attention(*qkv, mask, scale=0.3, kernel="flash") * real, q, k, v)
        return out, *backward(cotangent)

    compiled = jax.jit(row_sharding.with_mesh(on_mesh, run)).lower(*jax.device_put(arrays, rows)).compile()
    assert f"f32[1,{heads // 2},384,16]" in compiled.as_text()  # a kernel has half of the rows and heads
    for flash, plain in zip(compiled(*jax.device_put(arrays, rows)), expected, strict=True):
        np.testing.assert_allclose(flash, plain, atol=2e-5 * np.abs(plain).max())


def test_a_model_computes_alike_with_either_kernel(make_random):
    """Padding stands before a suffix; the sliding window of every other layer and the caps are Gemma 2's."""
    sizes = MINI.replace(decoder={"sliding_window": 6, "attn_softcap": 2.0})
    arrays = param_tree.flatten(make_random(nnx.eval_shape(lambda: PaliGemma(sizes, rngs=nnx.Rngs(0)))))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)), jnp.float32)
    tokens = jnp.arange(24).reshape(2, 12) + 5
    real = jnp.ones((2, 12), bool).at[1, 4:6].set(False)
    mask_ar = jnp.broadcast_to((jnp.arange(12) > 6).astype(jnp.int32), (2, 12))

    def logits(**changes):
        config = sizes.replace(both={"attention": "plain"} | changes.pop("both", {}), **changes)
        model = nnx.eval_shape(lambda: PaliGemma(config, rngs=nnx.Rngs(0)))
        call = jax.jit(lambda arrays: param_tree.assign(model, arrays)(images, tokens, mask_ar, real)[0])
        return np.asarray(call(arrays))[np.asarray(real)]

    plain = logits()
    np.testing.assert_allclose(logits(both={"attention": "flash"}), plain, atol=1e-4 * np.abs(plain).max())
    assert np.abs(logits(decoder={"sliding_window": None}) - plain).max() > 1e-2 * np.abs(plain).max()


# Short sequences.


def by_key(rows=2, length=LENGTH):
    """A mask of keys [B, 1, S]."""
    return jnp.asarray(np.random.default_rng(1).random((rows, 1, length)) < 0.7)


def flattened(heads, mask):
    """Returns `short_attention` as a function of arrays with heads."""

    def call(q, k, v):
        flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        return short_attention(*flat, mask, num_heads=heads, scale=0.3).reshape(q.shape)

    return call


def with_gradients(function, q, k, v, cotangent):
    out, backward = jax.vjp(function, q, k, v)
    return [out, *backward(cotangent)]


@pytest.mark.parametrize(
    ("heads", "width", "length", "masked", "dtype", "tolerance"),
    [(4, 64, 20, False, "float32", 2e-6), (3, 72, 13, True, "float32", 2e-6), (2, 16, 20, True, "bfloat16", 0.02)],
)
def test_short_sequences(monkeypatch, heads, width, length, masked, dtype, tolerance):
    """With heads of 64, two blocks of two."""
    monkeypatch.setattr(short, "_BLOCKS", 4 * short._ARRAYS * 32 * 2 * 64 * 4)
    arrays, mask = inputs(heads, heads, width, dtype, length), by_key(length=length) if masked else None
    got = with_gradients(flattened(heads, mask), *arrays)
    want = with_gradients(lambda *qkv: plain_attention(*qkv, mask, scale=0.3), *arrays)
    for one, other in zip(got, want, strict=True):
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_blocks_of_short_sequences_are_whole_heads_and_registers():
    assert short.block_width(196, 768, 64, "bfloat16") == 768
    assert short.block_width(256, 1152, 72, "bfloat16") == 1152
    assert short.block_width(256, 1536, 64, "bfloat16") == 768
    assert short.block_width(256, 1408, 88, "bfloat16") is None  # 16 heads of 88 share their registers


def test_short_sequences_are_split_over_the_mesh():
    mask, arrays = by_key(length=20), inputs(4, 4, 16, length=20)
    want = with_gradients(lambda *qkv: plain_attention(*qkv, mask, scale=0.3), *arrays)
    on_mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    run = jax.jit(row_sharding.with_mesh(on_mesh, lambda *all_: with_gradients(flattened(4, mask), *all_)))
    rows = NamedSharding(on_mesh, PartitionSpec(row_sharding.ROW_AXES))
    compiled = run.lower(*jax.device_put(arrays, rows)).compile()
    assert "f32[1,20,32]" in compiled.as_text()  # a kernel has half of the rows and heads
    for one, other in zip(compiled(*jax.device_put(arrays, rows)), want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_computes_alike_with_the_kernel_for_short_sequences(monkeypatch, masked):
    block = encoder_block.EncoderBlock(ViTConfig(width=32, mlp_dim=64, num_heads=2), rngs=nnx.Rngs(0))
    graph, arrays = nnx.split(jax.tree.map(lambda x: x + 0.1, block))
    x, mask = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 32)), jnp.float32), by_key(length=9)

    def output_and_gradients():
        loss = lambda arrays, x: jnp.sin(nnx.merge(graph, arrays)(x, mask=mask if masked else None)).sum()  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(arrays, x)

    want = output_and_gradients()
    monkeypatch.setattr(encoder_block, "has_short", lambda *_: True)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), output_and_gradients(), want
    )


def test_the_mlp_of_tpus_computes_alike(monkeypatch):
    config = ViTConfig(width=16, mlp_dim=32, num_heads=2, dtype="bfloat16")
    graph, arrays = nnx.split(jax.tree.map(lambda x: x + 0.1, encoder_block.EncoderMlp(config, rngs=nnx.Rngs(0))))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.bfloat16)

    def output_and_gradients():
        return jax.value_and_grad(lambda arrays, x: jnp.sin(nnx.merge(graph, arrays)(x)).sum(), (0, 1))(arrays, x)

    want = output_and_gradients()
    monkeypatch.setattr(encoder_block.devices, "platform", lambda: "tpu")
    monkeypatch.setattr(
        encoder_block, "_plain_activated_product", spy := mock.Mock(wraps=encoder_block._plain_activated_product)
    )
    got = output_and_gradients()
    assert spy.call_count == 2  # forward, and within the backward pass
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.float32(one), np.float32(other)), got, want)


def test_what_the_tpu_holds_apart_from_products_has_the_gradient_of_the_identity(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    x = jnp.arange(3, dtype=jnp.bfloat16)
    assert "optimization_barrier" in str(jax.make_jaxpr(numerics.materialized)(x))
    assert "optimization_barrier" not in str(jax.make_jaxpr(numerics.materialized)(x.astype(jnp.float32)))
    np.testing.assert_array_equal(jax.vjp(numerics.materialized, x)[1](2 * x)[0], 2 * x)


# Choice.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"kernel": "flash"}, True),
        ({"kernel": "plain"}, False),
        ({"length": 257}, False),
        ({"dtype": "float32"}, False),
        ({"head_dim": 88}, False),
        ({"mask": jnp.ones((2, 1, 256), bool)}, True),
        ({"mask": jnp.ones((2, 256, 256), bool)}, False),
    ],
)
def test_short_sequences_in_bfloat16_use_their_kernel_on_tpus(monkeypatch, changes, expected):
    arguments = {"kernel": "auto", "length": 256, "num_heads": 16, "head_dim": 72, "dtype": "bfloat16", "mask": None}
    monkeypatch.setattr(partition, "is_partitioned_unseen", lambda: False)
    assert not has_short(**arguments | changes)
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    assert has_short(**arguments | changes) is expected


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "cap", "expected"),
    [
        ("cpu", "bfloat16", 4096, None, False),
        ("tpu", "bfloat16", 4096, 50.0, True),
        ("tpu", "float32", 4096, None, False),
        ("tpu", "bfloat16", 64, None, False),
        ("gpu", "bfloat16", 4096, None, True),
        ("gpu", "bfloat16", 4096, 50.0, False),
        ("gpu", "float32", 4096, None, False),
    ],
)
def test_auto_takes_flash_where_there_is_one_for_long_sequences(monkeypatch, platform, dtype, length, cap, expected):
    device = dataclasses.make_dataclass("Device", ["compute_capability"])("9.0")
    monkeypatch.setattr(gpu.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(devices, "platform", lambda: platform)
    monkeypatch.setattr(partition, "is_partitioned_unseen", lambda: False)
    monkeypatch.setattr(dispatch, "SHORTEST", {"tpu": 512, "gpu": 512})
    assert has_flash("auto", length, 256, jnp.dtype(dtype), cap) is expected
    assert not has_flash("plain", length, 256, jnp.dtype(dtype), cap)
    monkeypatch.setattr(partition, "is_partitioned_unseen", lambda: True)
    assert not has_flash("auto", length, 256, jnp.dtype(dtype), cap)


def test_what_surrounds_the_gpus_kernel(monkeypatch):
    """With XLA's attention in place of cuDNN's, which is not here: the padding, the mask and the scale."""
    monkeypatch.setattr(gpu, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(gpu, "fits_gpu", lambda *_: True)
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    assert_flash_is_plain(inputs(4, 2, 16), *packed_inputs())
    assert_flash_is_plain(inputs(2, 2, 72), None, jnp.ones((1, 1, 1, 1)))


def test_a_kernel_that_a_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "fits_gpu", lambda *_: False)
    with pytest.raises(ValueError, match="'flash', but this GPU has none .*: set it to auto"):
        has_flash("flash", 512, 256, jnp.dtype("bfloat16"), 50.0)
    with pytest.raises(ValueError, match="'fast', expected one of auto, plain, flash"):
        has_flash("fast", 512, 256, jnp.dtype("bfloat16"))
