"""Separate arrays for the layers of a decoder, for decoding on a CPU.

XLA's products on a CPU read whole arrays: a scan over stacked layers copies every layer's weights before each product,
again for every token. Sliced once before the loop over tokens, they are only read.
"""

import math

import jax
from flax import nnx

from paligemma_jax.models.gemma import Gemma
from train_jax.core import devices

FEWEST_TOKENS = 16  # for fewer new tokens, slicing and the compilation of every layer by itself do not pay
MOST_BYTES = 1 << 30  # of the layers, which are held twice


def take_apart(decoder: Gemma, num_tokens: int) -> Gemma:
    """Replaces the decoder's stack in place by one stack for each layer, where that makes decoding faster.

    Args:
      decoder: traced; the layers are sliced where the loop over tokens begins.
      num_tokens: number of tokens that will be decoded.
    """
    graph, arrays = nnx.split(decoder.layers)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    on_one_cpu = devices.is_one_device() and devices.device_kind() == "cpu"
    if not on_one_cpu or num_tokens < FEWEST_TOKENS or size > MOST_BYTES:
        return decoder
    depth = len(decoder.layers.pre_attention_norm.scale)
    slices = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], arrays) for i in range(depth)]
    # setattr, as everywhere else the attribute is a stack of blocks.
    setattr(decoder, "layers", nnx.List([nnx.merge(graph, one) for one in slices]))  # noqa: B010
    return decoder
