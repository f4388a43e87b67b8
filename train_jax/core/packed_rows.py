"""Several examples in one row of a batch: moves arrays between examples and rows, exactly in value and gradient.

A model may compute rows of L positions that hold several examples each, and padding:

  slots      0  1  2  3  4  8  9 10 11 -1     example 0 has positions 0-4, example 1 has 8-11 (each has room for S = 8)
  segment    1  1  1  1  1  2  2  2  2  0     the example, from 1
  position   0  1  2  3  4  0  1  2  3  .     restarts with every example

Rows and examples are divided into G groups, one for each device of the mesh, so that no example leaves its device. The
layout is chosen in train_jax/data/layout.py. Axes: B = G g examples with room for S positions, R = G r rows of L
positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class PackedRows(NamedTuple):
    """The mapping between positions of examples and positions of rows.

    Attributes:
      slots: for each position of a row, the one among the g S positions of the group's examples; -1 is padding.
      positions: the inverse, for each position of an example the one among the r L of the group's rows; -1 is none.
    """

    slots: Int[Array, "G r L"]
    positions: Int[Array, "B S"]

    def pack(self, x: Float[Array, "B S D"]) -> Float[Array, "R L D"]:
        """Returns the rows of the examples' arrays; padding is 0."""
        G, r, L = self.slots.shape
        return _move(_grouped(x, G), self.slots.reshape(G, r * L), self._places()).reshape(G * r, L, x.shape[-1])

    def unpack(self, x: Float[Array, "R L D"], first: int) -> Float[Array, "B T D"]:
        """Returns the examples' arrays from position `first` on; 0 where a position is not in a row."""
        (G, r, L), (B, width) = self.slots.shape, self.positions.shape
        slots = self.slots.reshape(G, r * L)
        example, position = slots // width, slots % width
        back = jnp.where((slots >= 0) & (position >= first), example * (width - first) + position - first, -1)
        places = self.positions[:, first:].reshape(G, -1)
        return _move(x.reshape(G, r * L, x.shape[-1]), places, back).reshape(B, width - first, x.shape[-1])

    def of_positions(self, x: Array) -> Array:
        """Returns integers or booleans [B, S] in rows [R, L]; values at padding are arbitrary."""
        G, r, L = self.slots.shape
        values = jnp.take_along_axis(x.reshape(G, -1), jnp.maximum(self.slots, 0).reshape(G, r * L), axis=1)
        return values.reshape(G * r, L)

    def of_examples(self, keys: Key[Array, " B"]) -> Key[Array, "R L"]:
        """Returns the key of the example at each position of the rows, [R, L], given one key per example, [B]."""
        G, r, L = self.slots.shape
        example = jnp.maximum(self.slots, 0) // self.positions.shape[1]
        return jax.vmap(lambda keys, example: keys[example])(keys.reshape(G, -1), example).reshape(G * r, L)

    def segment(self, valid: Bool[Array, "B S"]) -> Int[Array, "R L"]:
        """Returns the example of each position, from 1 in each group; 0 for padding and for positions not valid."""
        G, r, L = self.slots.shape
        example = self.slots // self.positions.shape[1] + 1
        return jnp.where((self.slots.reshape(G * r, L) >= 0) & self.of_positions(valid), example.reshape(G * r, L), 0)

    def _places(self) -> Int[Array, "G gS"]:
        return self.positions.reshape(self.slots.shape[0], -1)


def _grouped(x: Array, groups: int) -> Array:
    return x.reshape(groups, -1, x.shape[-1])


@jax.custom_vjp
def _move(x: Float[Array, "G N D"], index: Int[Array, "G M"], inverse: Int[Array, "G N"]) -> Float[Array, "G M D"]:
    """Returns x[index] in each group, 0 where the index is -1; the gradient gathers by `inverse` and never scatters."""
    moved = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, :, None], axis=1)
    return jnp.where(index[:, :, None] >= 0, moved, jnp.zeros((), x.dtype))


def _move_forward(x, index, inverse):
    return _move(x, index, inverse), (index, inverse)


def _move_backward(residuals, gradient):
    index, inverse = residuals
    return _move(gradient, inverse, index), None, None


_move.defvjp(_move_forward, _move_backward)
