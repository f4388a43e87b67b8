"""A Flax NNX module as a graph and a flat dictionary of arrays by path ("decoder/layers/self_attn/q_proj/kernel").

Everything outside the models (optimizers, sharding rules, checkpoints, freezing, weight tables) speaks in these paths.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

Leaf = jax.Array | jax.ShapeDtypeStruct


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Leaf]]:
    """The module's structure and its arrays by path (shapes, of an abstract module); `merge` is the inverse."""
    graph, state = nnx.split(model)
    return graph, {_join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, arrays: Mapping[str, Any]) -> nnx.Module:
    """The module again; under jit this only rebuilds Python objects."""
    return nnx.merge(graph, nnx.from_flat_state([(_parts(path), leaf) for path, leaf in arrays.items()]))


def flatten(model: nnx.Module) -> dict[str, Leaf]:
    """Every array of a module by path."""
    return split(model)[1]


def abstract(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a module, which may be abstract itself (`nnx.eval_shape`)."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return {_join(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def assign(model: nnx.Module, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """The module with arrays replaced by path; paths that `arrays` lacks keep what they hold.

    Raises:
      KeyError: a path the module does not have.
      ValueError: an array of another shape.
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
    """The inverse of `_join`: entries of a list are numbers, which NNX sorts as such ("10" would come before "2")."""
    return tuple(int(part) if part.isdecimal() else part for part in path.split("/"))
