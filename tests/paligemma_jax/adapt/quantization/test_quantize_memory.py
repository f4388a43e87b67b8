"""Memory of training on a quantised base, as the compiler plans it (with all its optimizations)."""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.adapt.lora.adapter import TRAINABLE, attach_lora
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import param_tree


def training_memory(kind):
    """Temporary bytes of a LoRA step at batch 1 and 16 tokens, where weights dwarf activations; compiled, not run."""
    sizes = dict(width=512, depth=4, mlp_dim=2048, num_heads=8, head_dim=64, vocab_size=64, remat="block")
    vision = ViTConfig(image_size=8, patch_size=8, width=16, depth=1, mlp_dim=32, num_heads=2)
    config = PaliGemmaConfig(vision=vision, decoder=GemmaConfig(**sizes))

    def make():
        model = PaliGemma(config, rngs=nnx.Rngs(0))
        model = model if kind is None else pg.quantize(model, kind)
        return attach_lora(model, r"decoder/layers/.*", rngs=nnx.Rngs(1))

    model = nnx.eval_shape(make)
    graph, arrays = nnx.graphdef(model), param_tree.abstract(model)
    lora = {path: array for path, array in arrays.items() if re.fullmatch(TRAINABLE, path)}
    frozen = {path: array for path, array in arrays.items() if path not in lora}
    batch = dict(
        images=jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
        tokens=jax.ShapeDtypeStruct((1, 16), jnp.int32),
        mask_ar=jax.ShapeDtypeStruct((1, 16), jnp.int32),
    )

    def loss(lora, frozen, batch):
        return jnp.square(param_tree.merge(graph, lora | frozen)(**batch)[0]).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(lora, frozen, batch).compile()
    layer = 4 * sum(math.prod(leaf.shape[1:]) for path, leaf in arrays.items() if path.startswith("decoder/layers/"))
    return compiled.memory_analysis(), layer


def test_memory_of_a_qlora_step_is_that_of_plain_lora():
    plain, layer = training_memory(None)
    quantized, _ = training_memory("nf4")
    assert plain.argument_size_in_bytes > 4 * quantized.argument_size_in_bytes
    assert quantized.temp_size_in_bytes <= 1.3 * plain.temp_size_in_bytes
    assert quantized.temp_size_in_bytes < 2 * layer  # and not four layers' dequantised weights
