"""A multilayer perceptron for points [B, dim], with time features and labels added at the input."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from flow_jax.arrays import CheckedLabels
from flow_jax.models.layers import Condition, activation, batch_times, drop, linear
from train_jax.core import row_sharding


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes. The paper's two-dimensional model has 5 layers of width 512 (Lipman et al. 2023, appendix E).

    Attributes:
      dim: dimension of the points.
      width: of the hidden layers.
      depth: number of hidden layers.
      num_classes, vector_width: kind of condition, see layers.Condition.
      time_width: of the time features; 0 appends t itself to x, as in torchcfm's MLP, and allows no labels.
      activation: name of a function in jax.nn.
      dropout: rate before every hidden layer but the first.
    """

    dim: int = 2
    width: int = 512
    depth: int = 5
    num_classes: int | tuple[int, ...] = 0
    vector_width: int = 0
    time_width: int = 64
    activation: str = "silu"
    dropout: int | float = 0.0

    def __post_init__(self):
        conditional = self.num_classes or self.vector_width
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected 1 or more hidden layers.")
        if self.time_width == 1 or (conditional and not self.time_width):
            raise ValueError(f"time_width is {self.time_width}, expected 2 or more, or 0 without labels.")
        activation(self.activation)  # raises ValueError for an unknown name


class MLP(nnx.Module):
    """A multilayer perceptron that returns the velocity of points [B, dim]; the output starts at zero.

    `model(t, x, labels=None, dropout_keys=None)`; layers.py describes the arguments.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
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
        """Returns the velocity; layers.py describes the arguments."""
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
