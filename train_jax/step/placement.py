"""Splits a model into trainable and frozen arrays and puts them on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train_jax.core import param_tree, patterns, row_sharding
from train_jax.parallel import sharding
from train_jax.parallel.sharding import Spec
from train_jax.step import train_state


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model as trainable and frozen arrays, each with its sharding."""

    graph: nnx.GraphDef
    trainable: dict[str, param_tree.Leaf]
    frozen: dict[str, param_tree.Leaf]
    shardings: dict[str, NamedSharding]  # of all paths
    notes: list[str]  # dimensions that could not be split

    def merge(self, arrays: Mapping[str, param_tree.Leaf]) -> nnx.Module:
        """Returns the model with the given arrays, by path; all must be given."""
        return param_tree.merge(self.graph, arrays)

    def model(self, trained: Mapping[str, param_tree.Leaf] | None = None) -> nnx.Module:
        """Returns the model with trained parameters by path; None uses the initial ones."""
        return self.merge({**(self.trainable if trained is None else trained), **self.frozen})


def place(model: nnx.Module, trainable: str | None, rules: Sequence[tuple[str, Spec]], mesh: Mesh) -> PlacedModel:
    """Splits a model by the trainable pattern and puts every array onto the mesh.

    Args:
      model: with arrays (`Task.init`).
      trainable: pattern of the paths that train; None freezes all (`Task.trainable`).
      rules: (pattern, spec) pairs that cover every path (`Task.sharding_rules`).
      mesh: from `sharding.make_mesh`.

    Raises:
      UserError: the trainable pattern matches nothing, or a path has no sharding rule.
    """
    return _place(model, trainable, rules, mesh, jax.device_put)


def abstract(model: nnx.Module, trainable: str | None, rules: Sequence[tuple[str, Spec]], mesh: Mesh) -> PlacedModel:
    """Returns what `place` does for an abstract model (nnx.eval_shape), without allocating arrays."""

    def put(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _place(model, trainable, rules, mesh, put)


def _place(
    model: nnx.Module, trainable: str | None, rules: Sequence[tuple[str, Spec]], mesh: Mesh, put: Callable
) -> PlacedModel:
    """Does what `place` says; `put(array, sharding)` returns each array with its sharding."""
    arrays = param_tree.flatten(model)
    trains = set() if trainable is None else set(patterns.select(trainable, arrays, what="trainable parameters"))
    shardings, notes = sharding.shardings(mesh, rules, arrays)
    graph, _ = param_tree.split(row_sharding.mark(model, shardings))
    placed = {path: put(array, shardings[path]) for path, array in arrays.items()}
    return PlacedModel(
        graph,
        {path: array for path, array in placed.items() if path in trains},
        {path: array for path, array in placed.items() if path not in trains},
        shardings,
        notes,
    )


def own_copy(model: nnx.Module) -> nnx.Module:
    """Returns a model that this process can run alone: arrays shared by several processes are copied to its memory."""
    if jax.process_count() == 1:
        return model
    graph, arrays = param_tree.split(model)
    copies = {path: jnp.asarray(sharding.to_host(cast(jax.Array, array))) for path, array in arrays.items()}
    return param_tree.merge(graph, copies)


def create_state(
    placed: PlacedModel, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """Returns the state before the first step; optimizer moments are sharded like their parameters.

    Donates the trainable arrays of `placed`, so that only one copy is in memory.

    Args:
      placed: from `place`.
      optimizer: over the trainable parameters.
      mesh: of the model.
      **options: of `train_state.create`.
    """

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    shardings = state_shardings(make, placed, mesh)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(placed.trainable)


def abstract_state(
    placed: PlacedModel, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """Returns what `create_state` does for an abstract model, as shapes with shardings."""

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    shapes, shardings = jax.eval_shape(make, placed.trainable), state_shardings(make, placed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def state_shardings(make: Callable, placed: PlacedModel, mesh: Mesh) -> Any:
    """Returns a sharding for every leaf of `make(trainable)`.

    A leaf with the path and shape of a parameter has that parameter's sharding; all others are replicated.
    """

    def sharding_of(keys, leaf):
        path = next((key.key for key in keys if getattr(key, "key", None) in placed.trainable), None)
        if path is not None and leaf.shape == placed.trainable[path].shape:
            return placed.shardings[path]
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(make, placed.trainable))
