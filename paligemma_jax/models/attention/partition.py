"""Kernels on a mesh: each device computes attention for its own rows and heads.

The compiler partitions a Pallas kernel over no axis by itself, so it is called in a `jax.shard_map` over all of them.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from paligemma_jax.models.attention.masks import TokenMask
from train_jax.core import row_sharding

_HEADS = "tensor"  # the axis of the mesh that splits heads


def on_each_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B T *N"],
    k: Float[Array, "B S *K"],
    v: Float[Array, "B S *K"],
    mask: TokenMask | Bool[Array, "B 1 S"] | None,
    heads: tuple[int, int] | None = None,
) -> Float[Array, "B T *N"]:
    """Returns `kernel(q, k, v, mask)` over the mesh of the context.

    Rows or heads that the mesh does not divide are computed on every device. A single key/value head is
    copied to the devices that share its query heads.

    Args:
      kernel: of one device.
      q, k, v: with heads and their width as two axes, or flattened to one.
      mask: with rows on the first axis.
      heads: of queries and of keys, where they are flattened.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _automatic_axes(mesh)
    if not axes or mesh.size == 1:
        return kernel(q, k, v, mask)
    rows = row_sharding.ROW_AXES if row_sharding.row_parts(len(q)) > 1 else None
    query_heads, key_heads = _head_axes(mesh, axes, *(heads or (q.shape[2], k.shape[2])))
    queries, keys = PartitionSpec(rows, None, query_heads), PartitionSpec(rows, None, key_heads)
    return jax.shard_map(
        kernel,
        in_specs=(queries, keys, keys, PartitionSpec(rows)),
        out_specs=queries,
        axis_names=axes,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )(q, k, v, mask)


def is_partitioned_unseen() -> bool:
    """Whether the compiler may split arrays over several devices without a mesh in the context."""
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def _automatic_axes(mesh: AbstractMesh) -> set[str]:
    """Returns the axes of a mesh that no enclosing `shard_map` has."""
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def _head_axes(mesh: AbstractMesh, axes: set[str], queries: int, keys: int) -> tuple[str | None, str | None]:
    """Returns the axis that splits the heads of queries, and of keys and values."""
    parts = math.prod(mesh.shape[axis] for axis in axes if axis == _HEADS)
    if parts == 1 or queries % parts or (keys % parts and keys > 1):
        return None, None
    return _HEADS, None if keys % parts else _HEADS
