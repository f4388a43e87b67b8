"""The vision tower and attention in half precision, at magnitudes where float16 alone would lose everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.attention import attention
from paligemma_jax.models.vit import ViT, ViTConfig
from train_jax.core import param_tree

TOWER = ViTConfig(image_size=12, patch_size=4, width=32, depth=3, mlp_dim=64, num_heads=4)
OFFSET = 10_000.0


@pytest.fixture(scope="module")
def encode(make_random):
    """Features and intermediates of a tower whose residual stream is 1e4 everywhere, and carries signals near 10."""
    arrays = param_tree.flatten(make_random(nnx.eval_shape(lambda: ViT(TOWER, rngs=nnx.Rngs(0)))))
    for path in arrays:
        if path.endswith(("scale", "norm1/bias", "norm2/bias")):
            arrays[path] = jnp.ones_like(arrays[path]) if path.endswith("scale") else 0 * arrays[path]
    arrays["patch_embedding/bias"] = jnp.full_like(arrays["patch_embedding/bias"], OFFSET)
    arrays["position_embedding"] = 50 * arrays["position_embedding"]
    for name in ("self_attn/out_proj/kernel", "mlp/fc2/kernel"):
        arrays[f"layers/{name}"] = 10 * arrays[f"layers/{name}"]

    def run(dtype, images):
        model = nnx.eval_shape(lambda: ViT(dataclasses.replace(TOWER, dtype=dtype), rngs=nnx.Rngs(0)))
        return jax.jit(lambda arrays, images: param_tree.assign(model, arrays)(images))(arrays, images)

    return run


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)), jnp.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.12)])
def test_the_tower_keeps_its_signal_on_a_residual_of_1e4(encode, images, dtype, tolerance):
    """Steps of float16 are 8 at 1e4, of bfloat16 64: the residual sum and the norms must be in float32."""
    exact, out = encode("float32", images)
    assert np.abs(np.asarray(out["embedded"]) - OFFSET).max() < 100
    assert 5 < np.asarray(out["embedded"]).std(-1).mean() < 30
    features, _ = encode(dtype, images)
    assert features.dtype == jnp.float32 and np.isfinite(features).all()
    error = np.abs(np.asarray(features) - np.asarray(exact))
    assert error.max() > 0 and error.mean() < tolerance * np.asarray(exact).std()
    # Rounding the input of the first block alone would change it by half of its signal or more.
    rounded = np.asarray(out["embedded"].astype(dtype).astype(jnp.float32))
    lost = np.abs(rounded - np.asarray(out["embedded"])).mean() / np.asarray(out["embedded"]).std(-1).mean()
    assert lost > 4 * tolerance


def reference(q, k, v, mask, scale, cap):
    """Attention in float64, head by head."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for n in range(q.shape[2]):
        scores = np.einsum("BTH,BSH->BTS", q[:, :, n], k[:, :, n // group]) * scale
        scores = np.where(mask, cap * np.tanh(scores / cap), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, n] = np.einsum("BTS,BSH->BTH", weights / weights.sum(-1, keepdims=True), v[:, :, n // group])
    return out


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("largest", [1e5, 1e4, 100.0])
def test_soft_capped_attention(dtype, largest):
    """Beyond float16's range, where nearly all scores sit at the cap, and where the cap bends them."""
    rng, cap = np.random.default_rng(2), 50.0
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, heads, 8)), dtype) for heads in (4, 2, 2))
    mask = jnp.asarray(rng.random((2, 6, 6)) < 0.7).at[:, :, 0].set(True)
    scores = np.einsum("BTKGH,BSKH->BTKGS", np.float64(q).reshape(2, 6, 2, 2, 8), np.float64(k))
    scale = largest / np.abs(scores).max()
    result = jax.jit(lambda *qkvm: attention(*qkvm, scale=scale, cap=cap))(q, k, v, mask)
    assert result.dtype == dtype
    expected = reference(q, k, v, np.asarray(mask), scale, cap)
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(result), expected, atol=6 * step)
    uncapped = jax.jit(lambda *qkvm: attention(*qkvm, scale=scale))(q, k, v, mask)
    assert np.abs(np.float64(uncapped) - expected).max() > 20 * step  # the cap matters here
