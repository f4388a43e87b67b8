"""Meshes, sharding rules, and the way from rows in a process to arrays over all devices.

The mesh always has three axes. `data` and `fsdp` both split the batch; `fsdp` splits parameters as well, and `tensor`
splits parameters alone. Rules say which dimension of which parameter goes over which axis:

    (r"decoder/.*/q_proj/kernel", (None, "fsdp", "tensor"))   # layers, model, heads
    (r".*", ())                                               # the rest on every device
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from train_jax.core import patterns
from train_jax.core.errors import UserError
from train_jax.core.row_sharding import ROW_AXES

AXES = (*ROW_AXES, "tensor")

# One entry per dimension: the axis (or axes) it is split over, or None; () leaves an array of any rank whole.
Spec = tuple[str | tuple[str, ...] | None, ...]


def mesh_shape(sizes: Mapping[str, int] | ConfigDict, device_count: int, process_count: int = 1) -> dict[str, int]:
    """Resolves the sizes of a config's `mesh` to the number of devices along each axis.

    Args:
      sizes: size per axis name in `AXES`; one of them may be -1, which takes all devices that the others leave.
      device_count: devices over all processes.
      process_count: a single process may use fewer devices than there are; several must use all of them, and each
        must hold its own share of the batch.

    Raises:
      UserError: the sizes do not fit the devices or the processes.
    """
    shape = {axis: sizes[axis] for axis in AXES}
    found = " x ".join(f"{axis}={size}" for axis, size in shape.items())
    unknown = [axis for axis, size in shape.items() if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh {found}: expected positive sizes and at most one -1: correct config.mesh")
    known = math.prod(size for size in shape.values() if size != -1)
    if unknown:
        if device_count % known:
            raise UserError(
                f"mesh {found} on {device_count} devices: -1 cannot be resolved because {known} does not divide "
                f"{device_count}: change config.mesh"
            )
        shape[unknown[0]] = device_count // known
    total = math.prod(shape.values())
    if total > device_count or (process_count > 1 and total != device_count):
        expected = "exactly that many" if process_count > 1 else "at most that many"
        raise UserError(f"mesh {found} needs {total} devices and there are {device_count}, expected {expected}: "
                        f"change config.mesh, or set one axis to -1")  # fmt: skip
    if shape["data"] * shape["fsdp"] % process_count:
        raise UserError(
            f"mesh {found}: data x fsdp = {shape['data'] * shape['fsdp']} is not a multiple of the {process_count} "
            f"processes, so some would have no rows of their own: make data x fsdp larger and tensor smaller"
        )
    return shape


def make_mesh(sizes: Mapping[str, int] | ConfigDict) -> Mesh:
    """Returns the mesh of a config's `mesh` with axes ("data", "fsdp", "tensor"), all `AxisType.Auto`.

    data=-1, the default, means all devices: one on a laptop, eight on a TPU host. Devices are laid out process by
    process, so that process p of n holds the p-th part of the batch, which is what `local_rows` feeds it.
    (`jax.make_mesh` may interleave processes, and its axes are Explicit by default.)

    Raises:
      UserError: as `mesh_shape`.
    """
    shape = mesh_shape(sizes, jax.device_count(), jax.process_count())
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(devices[: math.prod(shape.values())]).reshape(tuple(shape.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, accumulate: bool = True) -> NamedSharding:
    """Returns the sharding of a batch: rows split over "data" and "fsdp".

    Args:
      mesh: from `make_mesh`.
      accumulate: True for arrays [A, b, ...] (A micro-batches one after another, rows on axis 1), False for [b, ...].
    """
    return NamedSharding(mesh, PartitionSpec(*((None,) if accumulate else ()), ROW_AXES))


def shardings(
    mesh: Mesh, rules: Sequence[tuple[str, Spec]], tree: Mapping[str, Any]
) -> tuple[dict[str, NamedSharding], list[str]]:
    """Returns the sharding of every leaf, and notes on what could not be split as its rule says.

    Args:
      mesh: from `make_mesh`.
      rules: (pattern, spec) pairs, the first match wins; a pattern may match nothing, since one table serves a
        model with and without adapters.
      tree: anything with a `shape` (array or `jax.ShapeDtypeStruct`) by "/"-joined path.

    Returns:
      The shardings by path, and one sentence for each dimension that its axis does not divide: it stays whole.

    Raises:
      UserError: a path without a rule, an unknown axis, or a spec with a number of entries other than the rank.
    """
    chosen, notes = {}, []
    for path, spec in patterns.cover(rules, tree, allow_unused=True).items():
        shape = tree[path].shape
        if spec and len(spec) != len(shape):
            raise UserError(
                f"{path}: its sharding rule {spec} has {len(spec)} entries for shape {tuple(shape)}, expected "
                f"{len(shape)} or none: correct the rule"
            )
        entries = []
        for dimension, entry in enumerate(spec):
            parts = _parts(mesh, path, entry)
            if shape[dimension] % parts:
                notes.append(
                    f"{path}: dimension {dimension} of {tuple(shape)} is not divisible by {parts} ({entry}), kept whole"
                )
                entry = None
            entries.append(entry)
        chosen[path] = NamedSharding(mesh, PartitionSpec(*entries))
    return chosen, notes


def with_shardings(tree: Any, place: Callable[[Any], NamedSharding]) -> Any:
    """Returns the shapes of a tree's leaves, each with the sharding that `place(leaf)` gives."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), tree)


def device_bytes(tree: Any) -> int:
    """Returns the bytes that a tree's leaves (arrays, or shapes with shardings) take on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parts(mesh: Mesh, path: str, entry: str | tuple[str, ...] | None) -> int:
    """Returns into how many parts the axes of one spec entry cut a dimension."""
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    for axis in axes:
        if axis not in mesh.shape:
            raise UserError(
                f"{path}: its sharding rule names the axis {axis!r}, expected one of {', '.join(mesh.shape)}"
                f"{patterns.did_you_mean(axis, mesh.shape)}"
            )
    return math.prod(mesh.shape[axis] for axis in axes)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(process_index: int, process_count: int, batch_size: int) -> slice:
    """Returns the rows of a batch of `batch_size` that belong to one process: the p-th of n equal parts.

    Raises:
      UserError: the batch does not divide over the processes.
    """
    rows, rest = divmod(batch_size, process_count)
    if rest:
        raise UserError(
            f"a batch of {batch_size} does not divide over {process_count} processes: choose a multiple of that"
        )
    return slice(process_index * rows, (process_index + 1) * rows)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
    """Returns global arrays made of the rows that each process holds.

    Args:
      batch: this process's rows; the axis that `spec` splits is 1/process_count of the global one.
      mesh: from `make_mesh`.
      spec: how the arrays are split, `batch_sharding(mesh).spec`.
    """
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
