"""A Flax NNX module as a graph and a flat dictionary of arrays by path ("decoder/layers/self_attn/q_proj/kernel").

Optimizers, sharding rules, checkpoints, freezing and weight tables all use these paths.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
Leaf = Any  # a jax.Array, or a jax.ShapeDtypeStruct in an abstract module


def split(model: M) -> tuple[nnx.GraphDef[M], dict[str, Leaf]]:
    """Splits a module into its graph and its arrays (or shapes, for an abstract module) by path; inverse of `merge`."""
    graph, state = nnx.split(model)
    return graph, {_join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef[M], arrays: Mapping[str, Leaf]) -> M:
    """Returns the module of a graph and arrays by path; under jit this only builds Python objects."""
    return nnx.merge(graph, nnx.from_flat_state([(_parts(path), leaf) for path, leaf in arrays.items()]))


def flatten(model: nnx.Module) -> dict[str, Leaf]:
    """Returns the arrays of a module by path."""
    return split(model)[1]


def abstract(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every array of a module, which may be abstract (`nnx.eval_shape`)."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return {_join(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def assign(model: M, arrays: Mapping[str, jax.Array]) -> M:
    """Returns the module with some arrays replaced, by path.

    Raises:
      KeyError: the module has no such path.
      ValueError: an array has another shape than the one it replaces.
    """
    shapes = abstract(model)
    for path, array in arrays.items():
        if shapes[path].shape != array.shape:
            raise ValueError(f"{path} has shape {shapes[path].shape}, got an array of shape {array.shape}.")
    graph, state = nnx.split(model)
    leaves = {_join(path): leaf for path, leaf in nnx.to_flat_state(state)}
    return merge(graph, leaves | dict(arrays))


def _join(path: tuple) -> str:
    return "/".join(map(str, path))


def _parts(path: str) -> tuple[str | int, ...]:
    """Inverts `_join`. Indices of a list become integers, since NNX sorts keys and "10" would precede "2"."""
    return tuple(int(part) if part.isdecimal() else part for part in path.split("/"))
