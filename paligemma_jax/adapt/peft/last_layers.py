"""Tuning the last k layers of the decoder: the stack becomes two, of which the second trains.

A part of a stacked array cannot train alone: it would have gradients and moments of the whole. So the last layers get
arrays of their own, in float32, and the first ones stay bit for bit what they are.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel
from paligemma_jax.models.gemma import Gemma, GemmaBlock
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import projections
from train_jax.core import param_tree
from train_jax.core.errors import UserError

TRAINABLE = r"decoder/last_layers/.*"


class SplitGemma(Gemma):
    """A decoder whose last layers are a stack of their own, `last_layers`, that follows on `layers`."""

    ADDS = ("last_layers",)

    last_layers: GemmaBlock

    @property
    def stacks(self) -> list[nnx.Module]:
        """The stacks of blocks, first to last."""
        return [*super().stacks, self.last_layers]


def split_last_layers(model: PaliGemma, k: int = 1) -> PaliGemma:
    """Moves the last k layers of the decoder to a stack of their own, in place; `join_last_layers` moves them back.

    Raises:
      UserError: k is not between 1 and the depth less one, the stack is split already, or its kernels are quantised.
    """
    decoder = model.decoder
    depth = decoder.config.depth
    if isinstance(decoder, SplitGemma):
        raise UserError("the decoder's last layers are apart already: join them before splitting anew.")
    if not 1 <= k < depth:
        raise UserError(
            f"the last {k} layers are to train, expected 1 to {depth - 1} of the {depth}: change the number."
        )
    if any(isinstance(module.kernel, QuantizedKernel) for module in projections(decoder.layers).values()):
        raise UserError(
            "the last layers are to train but the base is quantised, and quantised kernels have no gradient: load it "
            "without quantisation, or train adapters."
        )
    whole = decoder.layers
    decoder.layers = _part(whole, lambda leaf: leaf[: depth - k])
    last = _part(whole, lambda leaf: leaf[depth - k :].astype(jnp.float32))
    attachment.attach(decoder, SplitGemma, last_layers=last)
    return model


def join_last_layers(model: PaliGemma) -> PaliGemma:
    """One stack again, in the dtype of the first layers, in place.

    Raises:
      UserError: the last layers are not apart.
    """
    decoder = model.decoder
    if not isinstance(decoder, SplitGemma):
        raise UserError("the decoder's last layers are not apart, expected a model with last layers that were trained.")
    last = param_tree.flatten(decoder.last_layers)
    graph, first = param_tree.split(decoder.layers)
    joined: dict[str, Array] = {
        path: jnp.concatenate([leaf, last[path].astype(leaf.dtype)]) for path, leaf in first.items()
    }
    decoder.layers = param_tree.merge(graph, joined)
    attachment.detach(decoder, SplitGemma)
    return model


def _part(stack: nnx.Module, cut) -> nnx.Module:
    graph, arrays = param_tree.split(stack)
    return param_tree.merge(graph, {path: cut(leaf) for path, leaf in arrays.items()})
