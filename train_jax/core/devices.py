"""The devices that a program is traced for: the mesh in the context has them (row_sharding.use_mesh)."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from train_jax.core import row_sharding


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh in the context, or else of JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Returns the kind of the devices, such as "cpu" or "TPU v5 lite"; "" without a mesh in the context."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def is_one_device() -> bool:
    """Whether the context's mesh has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size == 1


def use_one_device(tree: Any) -> contextlib.AbstractContextManager:
    """Returns the context of a mesh of one device, if all arrays of a tree are on one and there is no other context."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    traced = any(isinstance(array, Tracer) for array in arrays)
    devices = set() if traced else {device for array in arrays for device in array.devices()}
    if len(devices) != 1 or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return row_sharding.use_mesh(Mesh(np.array([*devices]).reshape(1, 1), row_sharding.ROW_AXES))


def on_whole_arrays(function: Callable) -> Callable | None:
    """Returns `function` for arrays that every device holds whole, or None where arrays may be split.

    For Pallas kernels, which the compiler cannot partition. None means that the context has no mesh, or that an axis
    besides ROW_AXES splits it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if is_one_device():
        return function
    if mesh.empty or row_sharding.row_devices() != mesh.size:
        return None
    return jax.shard_map(function, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
