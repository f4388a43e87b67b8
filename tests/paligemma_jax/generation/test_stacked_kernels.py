"""Kernels that read their stack in place: the Pallas products in interpret mode, and decoding with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.quantization import nf4_tpu
from paligemma_jax.adapt.quantization.quantize import quantize
from paligemma_jax.generation import few_rows, stacked_kernels
from paligemma_jax.generation.generate import generate
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import devices

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = PaliGemmaConfig(
    vision=ViTConfig(image_size=8, patch_size=4, width=32, depth=1, mlp_dim=32, num_heads=2),
    decoder=GemmaConfig(vocab_size=300, width=128, depth=2, mlp_dim=256, num_heads=2, head_dim=64, dtype="bfloat16"),
).replace(both=dict(param_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("shape", "transposed", "dtype"),
    [((2, 256, 128), False, "bfloat16"), ((2, 200, 256), True, "bfloat16"), ((2, 128, 256), True, "int8")],
    ids=["kernel", "vocabulary of no whole tiles", "int8 codes"],
)
def test_product_with_one_layer_of_a_stack(shape, transposed, dtype, monkeypatch):
    monkeypatch.setattr(few_rows, "_BLOCK", 2 * 128 * 128)  # several blocks along both axes
    monkeypatch.setattr(few_rows, "_LARGEST_TILE", 128)
    stack = (40 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    x = few_rows.padded(jax.random.normal(jax.random.key(1), (3, shape[1 + transposed]), jnp.bfloat16))
    got = few_rows.product(x, stack, jnp.int32(1), transposed=transposed, interpret=True)
    matrix = np.asarray(stack[1], np.float32)
    want = np.asarray(x, np.float32) @ (matrix.T if transposed else matrix)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    assert not got[3:].any()


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_decoding_in_place_equals_decoding_by_slices(kind, monkeypatch):
    """Logits of a model decoded as on a TPU, where few rows take the kernels, and without any of it."""
    model = PaliGemma(CONFIG, rngs=nnx.Rngs(0))
    if kind:
        quantize(model, kind, targets="decoder/.*_proj")
    features = jax.random.normal(jax.random.key(1), (2, 4, 128))
    prompts = None, np.arange(12).reshape(2, 6), None
    options = dict(image_features=features, return_out=True, eos_id=-1)
    _, plain = generate(model, *prompts, 2, **options)
    called = []

    def interpreted(name, product):
        return lambda *given, **options: called.append(name) or product(*given, interpret=True, **options)

    monkeypatch.setattr(devices, "device_kind", lambda: "TPU v5 lite")
    monkeypatch.setattr(few_rows, "product", interpreted("few_rows", few_rows.product))
    monkeypatch.setattr(nf4_tpu, "product", interpreted("nf4_tpu", nf4_tpu.product))
    monkeypatch.setattr(nf4_tpu, "dequantize", functools.partial(nf4_tpu.dequantize, interpret=True))
    _, in_place = generate(model, *prompts, 3, **options)  # traced anew
    assert set(called) == ({"few_rows", "nf4_tpu"} if kind == "nf4" else {"few_rows"})
    np.testing.assert_allclose(in_place["logits"][:, :2], plain["logits"], atol=0.03)  # logits of about 1


def test_kernels_stay_as_they_are_where_no_context_says_that_there_is_one_tpu():
    decoder = PaliGemma(CONFIG, rngs=nnx.Rngs(0)).decoder
    assert isinstance(stacked_kernels.read_in_place(decoder).layers.mlp.gate_proj.kernel, nnx.Variable)
