"""Merges adapters into a quantised base and measures the change of the model's logits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.adapt.lora.adapter import largest_logit_gap, merge_lora
from paligemma_jax.adapt.quantization.quantize import dequantize
from paligemma_jax.models.paligemma import PaliGemma


def merge_quantized(
    model: PaliGemma, *, requantize: bool = False, inputs: dict[str, jax.Array] | None = None
) -> tuple[nnx.Module, float]:
    """Merges adapters in float32 into the dequantised weights that they were trained with, and compares logits.

    Args:
      model: with adapters on a quantised base; it is not changed.
      requantize: whether to quantise merged kernels again, which rounds away part of the adapter; otherwise all kernels
        become plain, in their dtype before quantisation.
      inputs: arguments of the model's call for the comparison; None means `probe_inputs`.

    Returns:
      The merged model, and the largest absolute difference of its logits from those of `model`.

    Raises:
      UserError: the model has no adapters.
    """
    merged = merge_lora(nnx.clone(model), requantize=requantize)
    if not requantize:
        merged = dequantize(merged)
    return merged, largest_logit_gap(model, merged, **(inputs or probe_inputs(model)))


def probe_inputs(model: PaliGemma, rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Returns random images in [-1, 1] and tokens, the first half a prefix, for comparing two models."""
    rng = np.random.default_rng(seed)
    pixels = model.config.vision.image_size
    return {
        "images": jnp.asarray(rng.uniform(-1, 1, (rows, pixels, pixels, 3)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(1, model.config.decoder.vocab_size, (rows, length)), jnp.int32),
        "mask_ar": jnp.broadcast_to((jnp.arange(length) >= length // 2).astype(jnp.int32), (rows, length)),
        "mask_input": jnp.ones((rows, length), bool),
    }
