"""Tuning of the decoder's last k layers: the stack is split into two, of which the second trains.

A part of a stacked array cannot train alone, since gradients and moments would have the size of the whole. So the last
layers get their own arrays, in float32, and the first ones do not change.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.method import Method, not_detachable
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel
from paligemma_jax.models.gemma import Gemma, GemmaBlock
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import projections
from train_jax.core import param_tree
from train_jax.core.errors import UserError

TRAINABLE = r"decoder/last_layers/.*"


class SplitGemma(Gemma):
    """A decoder whose last layers are in a separate stack, `last_layers`, which runs after `layers`."""

    ADDS = ("last_layers",)

    last_layers: GemmaBlock

    @property
    def stacks(self) -> Sequence[GemmaBlock]:
        """The stacks of blocks, first to last."""
        return [*super().stacks, self.last_layers]


def split_last_layers(model: PaliGemma, k: int = 1) -> PaliGemma:
    """Moves the last k layers of the decoder to a separate stack, in place; `join_last_layers` moves them back.

    Raises:
      UserError: k is not between 1 and depth - 1, the stack is split already, or its kernels are quantised.
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
    layers, arrays = decoder.layers, _arrays(decoder.layers)
    last = {path: array[depth - k :].astype(jnp.float32) for path, array in arrays.items()}
    decoder.layers = _replace_arrays(layers, {path: array[: depth - k] for path, array in arrays.items()})
    attachment.attach(decoder, SplitGemma, last_layers=_replace_arrays(layers, last))
    return model


def join_last_layers(model: PaliGemma) -> PaliGemma:
    """Joins both stacks to one, in the dtype of the first layers, in place.

    Raises:
      UserError: the last layers are not in a separate stack.
    """
    decoder = model.decoder
    if not isinstance(decoder, SplitGemma):
        raise UserError("the decoder's last layers are not apart, expected a model with last layers that were trained.")
    last = _arrays(decoder.last_layers)
    decoder.layers = _replace_arrays(
        decoder.layers,
        {path: jnp.concatenate([a, last[path].astype(a.dtype)]) for path, a in _arrays(decoder.layers).items()},
    )
    attachment.detach(decoder, SplitGemma)
    return model


def _arrays(stack: GemmaBlock) -> dict[str, jax.Array]:
    return cast(dict[str, jax.Array], param_tree.flatten(stack))  # only an abstract model has shapes instead


def _replace_arrays(stack: GemmaBlock, arrays: dict[str, jax.Array]) -> GemmaBlock:
    """Returns a copy of a stack with other arrays, which may have another number of layers."""
    return cast(GemmaBlock, param_tree.merge(nnx.graphdef(stack), arrays))


@dataclasses.dataclass(frozen=True)
class LastLayers(Method[PaliGemma]):
    """Tuning of the last layers, by the protocol of all methods."""

    name: ClassVar[str] = "last_layers"
    modules: ClassVar = (SplitGemma,)
    keeps_base: ClassVar[bool] = False

    size: int = 1  # number of layers

    @property
    def trainable(self) -> str:
        """Pattern of the parameters of the last layers."""
        return TRAINABLE

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        return split_last_layers(model, self.size)

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """Raises UserError."""
        raise not_detachable(cls.name)

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """As in Method; see `join_last_layers`."""
        return join_last_layers(model)
