"""A multilayer perceptron for points: time features and labels beside x at the input, plain layers."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from flow_jax.arrays import CheckedLabels
from flow_jax.models.layers import Condition, activation, batch_times, drop, linear
from train_jax.core import row_sharding


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes. The paper's two-dimensional model is 5 layers of 512 (Lipman et al. 2023, appendix E).

    Attributes:
      dim: of the points.
      width, depth: of the hidden layers, and how many.
      num_classes, vector_width: what the model is told of every row, see layers.Condition.
      time_width: of the time features; 0 puts t itself beside x, as torchcfm's MLP has it, and takes no labels.
      activation: a function of jax.nn by name.
      dropout: before every hidden layer but the first.
    """

    dim: int = 2
    width: int = 512
    depth: int = 5
    num_classes: int | tuple[int, ...] = 0
    vector_width: int = 0
    time_width: int = 64
    activation: str = "silu"
    dropout: int | float = 0.0


class MLP(nnx.Module):
    """Velocity of points [B, dim]; the output starts at zero."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        told = config.num_classes or config.vector_width
        if config.depth < 1 or (told and not config.time_width):
            raise ValueError(f"{config}: expected depth >= 1, and time_width > 0 with labels.")
        activation(config.activation)  # an unknown one is told here
        self.config = config
        sizes = config.width, config.num_classes, config.time_width, config.vector_width
        self.condition = nnx.data(Condition(*sizes, rngs=rngs) if config.time_width else None)
        self.inputs = linear(config.dim + (self.condition is None), config.width, rngs=rngs)
        self.hidden = nnx.List([linear(config.width, config.width, rngs=rngs) for _ in range(config.depth - 1)])
        self.outputs = linear(config.width, config.dim, zero=True, rngs=rngs)

    def __call__(
        self,
        t,
        x: Float[Array, "B D"],
        labels: CheckedLabels | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See layers.py for the arguments."""
        act, t = activation(self.config.activation), batch_times(t, x)
        if self.condition is None:
            h = row_sharding.apply_block(self.inputs, jnp.concatenate([x, t[:, None].astype(x.dtype)], axis=1))
        else:
            h = row_sharding.apply_block(self.inputs, x) + row_sharding.apply_block(self.condition, t, labels)
        h = act(h)
        for index, layer in enumerate(self.hidden):
            h = drop(h, self.config.dropout, dropout_keys, f"hidden/{index}")
            h = act(row_sharding.apply_block(layer, h))
        return row_sharding.apply_block(self.outputs, h)
