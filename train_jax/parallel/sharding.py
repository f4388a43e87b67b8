"""Meshes, sharding rules, and conversion of a process's rows to global arrays.

The mesh always has three axes. `data` and `fsdp` both split the batch, `fsdp` also splits parameters, and `tensor` only
splits parameters. Rules map the dimensions of parameters to axes:

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

# One entry for each dimension: the axis or axes that split it, or None. () replicates an array of any rank.
Spec = tuple[str | tuple[str, ...] | None, ...]


def mesh_shape(sizes: Mapping[str, int] | ConfigDict, device_count: int, process_count: int = 1) -> dict[str, int]:
    """Returns the number of devices along each axis for the sizes of a config's `mesh`.

    Args:
      sizes: size for each axis in `AXES`; one of them may be -1, which takes all remaining devices.
      device_count: devices of all processes.
      process_count: a single process may use fewer devices than there are; several must use all of them, and each
        must hold its own part of the batch.

    Raises:
      UserError: the sizes do not fit the devices or the processes.
    """
    shape = {axis: sizes[axis] for axis in AXES}
    text = " x ".join(f"{axis}={size}" for axis, size in shape.items())
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh {text}: expected positive sizes and at most one -1: correct config.mesh")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if free:
        if device_count % fixed:
            raise UserError(
                f"mesh {text} on {device_count} devices: -1 cannot be resolved because {fixed} does not divide "
                f"{device_count}: change config.mesh"
            )
        shape[free[0]] = device_count // fixed
    total = math.prod(shape.values())
    if total > device_count or (process_count > 1 and total != device_count):
        expected = "exactly that many" if process_count > 1 else "at most that many"
        raise UserError(f"mesh {text} needs {total} devices and there are {device_count}, expected {expected}: "
                        f"change config.mesh, or set one axis to -1")  # fmt: skip
    if row_divisor(shape) % process_count:
        raise UserError(
            f"mesh {text}: data x fsdp = {row_divisor(shape)} is not a multiple of the {process_count} "
            f"processes, so some would have no rows of their own: make data x fsdp larger and tensor smaller"
        )
    return shape


def make_mesh(
    sizes: Mapping[str, int] | ConfigDict,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  (JAX assigns the class)
) -> Mesh:
    """Returns the mesh of a config's `mesh` with axes ("data", "fsdp", "tensor"), all `AxisType.Auto`.

    data=-1, the default, means all devices: one on a laptop, eight on a TPU host. Devices are ordered by process, so
    that process p of n holds the p-th part of the batch, the rows of `local_rows`. (`jax.make_mesh` may interleave
    processes, and its axes are Explicit by default.)

    Args:
      sizes: as for `mesh_shape`.
      devices: to use in place of JAX's own, for programs that are compiled but not run.

    Raises:
      UserError: as `mesh_shape`.
    """
    if devices is None:
        shape, devices = mesh_shape(sizes, jax.device_count(), jax.process_count()), jax.devices()
    else:
        shape = mesh_shape(sizes, len(devices))
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered[: math.prod(shape.values())]).reshape(tuple(shape.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_divisor(shape: Mapping[str, int]) -> int:
    """Returns the number of parts into which a mesh of this shape, `mesh.shape`, splits rows."""
    return math.prod(shape[axis] for axis in ROW_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a full copy on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, accumulate: bool = True) -> NamedSharding:
    """Returns the sharding of a batch: rows split over "data" and "fsdp".

    Args:
      mesh: from `make_mesh`.
      accumulate: True for arrays [A, b, ...] (A micro-batches of b rows), False for [b, ...].
    """
    return NamedSharding(mesh, PartitionSpec(*((None,) if accumulate else ()), ROW_AXES))


def shardings(
    mesh: Mesh, rules: Sequence[tuple[str, Spec]], tree: Mapping[str, Any]
) -> tuple[dict[str, NamedSharding], list[str]]:
    """Returns the sharding of every leaf, and notes on dimensions that could not be split.

    Args:
      mesh: from `make_mesh`.
      rules: (pattern, spec) pairs, the first match wins. A pattern may match nothing, so that one table serves a model
        with and without adapters.
      tree: arrays or `jax.ShapeDtypeStruct` by "/"-joined path.

    Returns:
      The shardings by path, and a note for each dimension that its axis does not divide and that is not split.

    Raises:
      UserError: a path has no rule, a spec names an unknown axis, or its number of entries is not the rank.
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


def with_shardings(tree: Any, sharding_of: Callable[[Any], NamedSharding]) -> Any:
    """Returns the shapes of a tree's leaves, each with the sharding `sharding_of(leaf)`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf)), tree)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's leaves (arrays, or shapes with shardings) on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parts(mesh: Mesh, path: str, entry: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts into which a spec entry splits a dimension."""
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    for axis in axes:
        if axis not in mesh.shape:
            raise UserError(
                f"{path}: its sharding rule names the axis {axis!r}, expected one of {', '.join(mesh.shape)}"
                f"{patterns.did_you_mean(axis, mesh.shape)}"
            )
    return math.prod(mesh.shape[axis] for axis in axes)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(process_index: int, process_count: int, batch_size: int) -> slice:
    """Returns the rows of a batch of `batch_size` that belong to process p of n: the p-th of n equal parts.

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
    """Returns global arrays from the rows of each process.

    Args:
      batch: this process's rows; the axis that `spec` splits has 1/process_count of the global size.
      mesh: from `make_mesh`.
      spec: sharding of the arrays, `batch_sharding(mesh).spec`.
    """
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
