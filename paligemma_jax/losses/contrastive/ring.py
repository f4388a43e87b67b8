"""Folds over all texts without the matrix of all pairs: around a ring of devices, and in chunks on one device.

On the ring every device keeps its images, while the blocks of texts travel from neighbor to neighbor (Zhai et al.,
"Sigmoid Loss for Language Image Pre-Training", 2023, section 3.1). The results of a block, such as the gradient of its
texts, travel one hop behind it and reach its owner after a full round. The transfers and the computation of a hop do
not depend on each other, so they overlap.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh


class Ring(NamedTuple):
    """The devices along some axes of a mesh, for use within `shard_map`; a single device has no axes.

    Attributes:
      axes: names of the axes; the last one varies fastest.
      size: number of devices.
      mesh_axes: the same axes in the order of the mesh, as `lax.ppermute` requires.
      links: (from, to) pairs of device numbers along `mesh_axes`, from every device to the one before it.
    """

    axes: tuple[str, ...] = ()
    size: int = 1
    mesh_axes: tuple[str, ...] = ()
    links: tuple[tuple[int, int], ...] = ()

    def position(self) -> jax.Array | int:
        """Returns this device's number; the last axis varies fastest, as in `PartitionSpec(axes)`."""
        return lax.axis_index(self.axes) if self.size > 1 else 0

    def total(self, tree):
        """Sums arrays over the devices."""
        return lax.psum(tree, self.axes) if self.size > 1 else tree

    def shift(self, tree):
        """Sends arrays to the device before this one."""
        return lax.ppermute(tree, self.mesh_axes, self.links)


def ring_of(mesh: Mesh, axes: tuple[str, ...]) -> Ring:
    """Returns the ring of a mesh along `axes`, which may be in any order."""
    order = sorted(range(len(axes)), key=lambda index: mesh.axis_names.index(axes[index]))
    sizes = [mesh.shape[name] for name in axes]
    size = math.prod(sizes)
    # For each position on the ring, the device's number in the order of the mesh.
    numbers = np.argsort(np.arange(size).reshape(sizes).transpose(order).ravel()).tolist()
    links = tuple((numbers[position], numbers[position - 1]) for position in range(size))
    return Ring(axes, size, tuple(axes[index] for index in order), links) if size > 1 else Ring()


def fold_ring(ring: Ring, visit: Callable, merge: Callable, carry, block):
    """Folds `visit` over the blocks of all devices, as they travel around the ring.

    Args:
      ring: the devices.
      visit: `visit(carry, block, origin) -> (carry, part)`, where `origin` is the position of the block's owner.
      merge: `merge(part, part) -> part` of two devices' parts of the same block.
      carry: the value that stays on this device and is folded over the blocks.
      block: this device's own block.

    Returns:
      `carry` after all blocks, and the merged parts of this device's own block.
    """
    position = ring.position()
    if ring.size == 1:
        return visit(carry, block, position)
    next_block = ring.shift(block)
    carry, part = visit(carry, block, position)

    def hop(state, number):
        carry, merged, block = state
        next_block, arrived = ring.shift(block), ring.shift(merged)
        carry, part = visit(carry, block, (position + number) % ring.size)
        return (carry, merge(arrived, part), next_block), None

    (carry, merged, _), _ = lax.scan(hop, (carry, part, next_block), jnp.arange(1, ring.size, dtype=jnp.int32))
    return carry, ring.shift(merged)


def fold_chunks(step: Callable, carry, count: int, chunk_size: int):
    """Folds `step(carry, start, size)` over chunks of [0, count); the last one may be shorter."""
    size = min(chunk_size, count)
    full, rest = divmod(count, size)
    if full == 1:
        carry = step(carry, 0, size)
    else:
        carry = lax.fori_loop(0, full, lambda index, carry: step(carry, index * size, size), carry)
    return step(carry, full * size, rest) if rest else carry


def slice_chunk(tree, start, size: int):
    """Returns the elements [start, start + size) of arrays."""
    return jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, size), tree)


def update_chunk(tree, part, start):
    """Returns arrays with the elements from `start` on replaced by `part`."""
    return jax.tree.map(lambda array, new: lax.dynamic_update_slice_in_dim(array, new, start, 0), tree, part)
