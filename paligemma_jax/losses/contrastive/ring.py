"""Two ways of meeting all texts without holding a pair of each: a ring of devices, and chunks within one of them.

On the ring every device keeps its images, while the blocks of texts travel from neighbour to neighbour (Zhai et al.,
"Sigmoid Loss for Language Image Pre-Training", 2023, section 3.1). What a device finds out about a block, say the
gradient of its texts, travels behind the block and is home when it has been everywhere. Neither transfer waits for the
computation of the hop, nor does that wait for them, so they overlap.
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
    """The devices along some axes of a mesh; one device alone has no axes. Used within `shard_map`.

    Attributes:
      axes: the last one runs fastest.
      size: devices.
      mesh_axes: the same in the order of the mesh, the only one in which JAX sends.
      links: (from, to) pairs of device numbers along `mesh_axes`: everyone to the one before.
    """

    axes: tuple[str, ...] = ()
    size: int = 1
    mesh_axes: tuple[str, ...] = ()
    links: tuple[tuple[int, int], ...] = ()

    def position(self) -> jax.Array | int:
        """Number of this device, the last axis running fastest, as in `PartitionSpec(axes)`."""
        return lax.axis_index(self.axes) if self.size > 1 else 0

    def total(self, tree):
        """Sums over the devices."""
        return lax.psum(tree, self.axes) if self.size > 1 else tree

    def shift(self, tree):
        """Passes arrays on to the device before this one."""
        return lax.ppermute(tree, self.mesh_axes, self.links)


def ring_of(mesh: Mesh, axes: tuple[str, ...]) -> Ring:
    """The ring of a mesh along `axes`, in whatever order they are given."""
    order = sorted(range(len(axes)), key=lambda index: mesh.axis_names.index(axes[index]))
    sizes = [mesh.shape[name] for name in axes]
    size = math.prod(sizes)
    # Of the device at each position of the ring, its number along the mesh's order.
    numbers = np.argsort(np.arange(size).reshape(sizes).transpose(order).ravel()).tolist()
    links = tuple((numbers[position], numbers[position - 1]) for position in range(size))
    return Ring(axes, size, tuple(axes[index] for index in order), links) if size > 1 else Ring()


def fold_ring(ring: Ring, visit: Callable, merge: Callable, kept, block):
    """Takes every device's `block` past every device.

    Args:
      ring: the devices.
      visit: `visit(kept, block, origin) -> (kept, part)`, where `origin` is the position of the block's owner.
      merge: `merge(part, part) -> part` of two devices' parts of the same block.
      kept: what stays here and is folded over the blocks.
      block: this device's own.

    Returns:
      `kept` after all blocks, and the merged parts of this device's own block.
    """
    here = ring.position()
    if ring.size == 1:
        return visit(kept, block, here)
    following = ring.shift(block)
    kept, collected = visit(kept, block, here)

    def hop(carry, number):
        kept, collected, block = carry
        following, arrived = ring.shift(block), ring.shift(collected)
        kept, part = visit(kept, block, (here + number) % ring.size)
        return (kept, merge(arrived, part), following), None

    (kept, collected, _), _ = lax.scan(hop, (kept, collected, following), jnp.arange(1, ring.size, dtype=jnp.int32))
    return kept, ring.shift(collected)


def fold_chunks(step: Callable, carry, count: int, chunk_size: int):
    """Folds `step(carry, start, size)` over chunks of [0, count), the last one as short as it comes."""
    size = min(chunk_size, count)
    full, rest = divmod(count, size)
    if full == 1:
        carry = step(carry, 0, size)
    else:
        carry = lax.fori_loop(0, full, lambda index, carry: step(carry, index * size, size), carry)
    return step(carry, full * size, rest) if rest else carry


def take(tree, start, size: int):
    """Elements [start, start + size) of arrays."""
    return jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, size), tree)


def put(tree, part, start):
    """Arrays with the elements from `start` on replaced by those of `part`."""
    return jax.tree.map(lambda array, new: lax.dynamic_update_slice_in_dim(array, new, start, 0), tree, part)
