"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751): two small layers after each branch.

The output b of the attention and of the MLP becomes b + up(gelu(down(b))) before it is added to the residual stream;
`up` is zero initially. Only the decoder has them. They are not linear, so they cannot be merged into kernels.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.method import Method, not_mergeable
from paligemma_jax.models.gemma import GemmaBlock
from paligemma_jax.models.numerics import broadcast, cast
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import contract
from paligemma_jax.models.stack import make_stack
from train_jax.core.errors import UserError

TRAINABLE = r"decoder/.*/(attention|mlp)_adapter/.*"
_INITIAL_STD = 1e-2  # of the first layer, as in the paper


class Bottleneck(nnx.Module):
    """The adapter b + up(gelu(down(b))); parameters are float32, products in the compute dtype."""

    def __init__(self, features: int, width: int, dtype: str, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.down_kernel = nnx.Param(_INITIAL_STD * jax.random.normal(rngs.params(), (features, width)))
        self.down_bias = nnx.Param(jnp.zeros(width))
        self.up_kernel = nnx.Param(jnp.zeros((width, features)))
        self.up_bias = nnx.Param(jnp.zeros(features))

    def __call__(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the adapted branch in float32."""
        hidden = self._linear(branch, self.down_kernel, self.down_bias)
        return branch + self._linear(jax.nn.gelu(hidden, approximate=True), self.up_kernel, self.up_bias)

    def _linear(self, x: Array, kernel: nnx.Param, bias: nnx.Param) -> Array:
        dtype = jnp.dtype(self.dtype)
        y = contract(cast(x, dtype), kernel[...].astype(dtype), 1)
        return y + broadcast(bias[...], y)


class BottleneckBlock(GemmaBlock):
    """A decoder layer with a Bottleneck after each branch."""

    ADDS = ("attention_adapter", "mlp_adapter")

    attention_adapter: Bottleneck
    mlp_adapter: Bottleneck

    def attention_residual(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """As in GemmaBlock."""
        return self.attention_adapter(super().attention_residual(branch))

    def mlp_residual(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """As in GemmaBlock."""
        return self.mlp_adapter(super().mlp_residual(branch))


def attach_bottlenecks(model: PaliGemma, width: int = 16, *, rngs: nnx.Rngs) -> PaliGemma:
    """Adds bottleneck adapters to every block of the decoder, in place; the model's output does not change yet.

    Args:
      model: without bottleneck adapters.
      width: m, width of the hidden layer; an adapter has 2 m D + m + D parameters.
      rngs: random keys of the first layers; the second ones are zero.

    Raises:
      UserError: a width below 1, or a model that has bottleneck adapters already.
    """
    blocks, config = model.decoder.layers, model.config.decoder
    if width < 1:
        raise UserError(f"the bottleneck's width is {width}, expected 1 or more: raise it.")
    if isinstance(blocks, BottleneckBlock):
        raise UserError("the model has bottleneck adapters already: detach them before attaching others.")
    stacks = {
        name: make_stack(lambda rngs: Bottleneck(config.width, width, config.dtype, rngs=rngs), config.depth, rngs)
        for name in BottleneckBlock.ADDS
    }
    attachment.attach(blocks, BottleneckBlock, **stacks)
    return model


def detach_bottlenecks(model: PaliGemma) -> PaliGemma:
    """Removes the adapters, in place."""
    attachment.detach(model.decoder.layers, BottleneckBlock)
    return model


@dataclasses.dataclass(frozen=True)
class Bottlenecks(Method[PaliGemma]):
    """Bottleneck adapters in every layer of the decoder, by the protocol of all methods."""

    name: ClassVar[str] = "bottleneck"
    modules: ClassVar = (BottleneckBlock,)

    size: int = 16  # width

    @property
    def trainable(self) -> str:
        """Pattern of both adapters of every layer."""
        return TRAINABLE

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        return attach_bottlenecks(model, self.size, rngs=rngs)

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """As in Method."""
        return detach_bottlenecks(model)

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """Raises UserError."""
        raise not_mergeable("bottleneck adapters", "they are not linear")
