"""A projection with a low-rank update: y = x W + b + s (drop(x) A) B, rescaled with DoRA. Axes: see models."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from paligemma_jax.adapt.lora import low_rank
from paligemma_jax.adapt.lora.spec import LoraSpec
from paligemma_jax.models.dropout import DropoutKeys, example_dropout, fold_in_name
from paligemma_jax.models.numerics import broadcast, cast
from paligemma_jax.models.projection import Projection, contract


class LoraProjection(Projection):
    """A projection with a LoRA adapter, made by attach_lora.

    Attributes:
      lora_a, lora_b: [*in_shape, r] and [r, *out_shape], with a leading layer axis inside a stack of layers.
      lora_magnitude: DoRA's [*out_shape], or None.
      lora_layer_scale: [L], s of every layer if the layers of a stack differ in it, else None.
      lora_scale: s, if the layers do not differ in it, else 1.
      lora_dropout: probability of dropping an entry of the update's input, in training only.
      lora_spec: ranks and scales of every layer.
    """

    ADDS = ("lora_a", "lora_b", "lora_magnitude", "lora_layer_scale", "lora_scale", "lora_dropout", "lora_spec")

    lora_a: nnx.Variable
    lora_b: nnx.Variable
    lora_magnitude: nnx.Variable | None
    lora_layer_scale: nnx.Variable | None
    lora_scale: float
    lora_dropout: float
    lora_spec: LoraSpec

    def affine(self, x: Array, dropout_keys: DropoutKeys | None, out_dtype=jnp.float32) -> Array:
        """Returns x W + b and the update, in float32."""
        base = self.product(x, dropout_keys)
        y = self.add_bias(base)
        dropped = x
        if dropout_keys is not None and self.lora_dropout > 0.0:
            dropped = example_dropout(x, self.lora_dropout, fold_in_name(dropout_keys, self.name))
        update = contract(dropped, self.lora_a[...].astype(x.dtype), len(self.in_shape))
        update = contract(cast(update * self.scale, x.dtype), self.lora_b[...].astype(x.dtype), 1)
        if self.lora_magnitude is not None:
            gain = broadcast(self._gain(self.lora_magnitude, self.dense_kernel() + self.low_rank_delta()), y)
            update = gain * update + (gain - 1.0) * (base if dropped is x else self.product(dropped, dropout_keys))
        return y + update

    @property
    def scale(self) -> float | Float[Array, " L"] | Float[Array, ""]:
        """The factor s on the low-rank update; [L] for a stack whose layers differ in it."""
        return self.lora_scale if self.lora_layer_scale is None else self.lora_scale * self.lora_layer_scale[...]

    def low_rank_delta(self) -> Array:
        """Returns s A B in float32, in the shape of the kernel (with the layer axis if stacked)."""
        return low_rank.delta(self.lora_a[...], self.lora_b[...], self.scale, len(self.in_shape))

    def merged_kernel(self) -> Array:
        """Returns the kernel that includes the adapter: W + s A B, rescaled with DoRA; float32."""
        updated = self.dense_kernel() + self.low_rank_delta()
        if self.lora_magnitude is None:
            return updated
        gain = self._gain(self.lora_magnitude, updated)
        stack = updated.ndim - len(self.in_shape) - len(self.out_shape)
        return updated * lax.expand_dims(gain, range(stack, stack + len(self.in_shape)))

    def _gain(self, magnitude: nnx.Variable, updated: Array) -> Array:
        return low_rank.dora_gain(updated, magnitude[...], self.scale, len(self.in_shape), len(self.out_shape))
