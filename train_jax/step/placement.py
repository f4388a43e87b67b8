"""From a task's module to sharded arrays: what trains, what is frozen, and how every leaf lies on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train_jax.core import param_tree, patterns, row_sharding
from train_jax.parallel import sharding
from train_jax.step import train_state
from train_jax.task import Task


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model as the loop holds it."""

    graph: nnx.GraphDef
    trainable: dict[str, param_tree.Leaf]
    frozen: dict[str, param_tree.Leaf]
    shardings: dict[str, NamedSharding]  # of all paths
    notes: list[str]  # dimensions that could not be split

    def merge(self, arrays: dict[str, jax.Array]) -> nnx.Module:
        """All parameters by path -> the model."""
        return param_tree.merge(self.graph, arrays)

    def model(self, trained: dict[str, jax.Array] | None = None) -> nnx.Module:
        """The model with some trained parameters (those of the start when None)."""
        return self.merge((self.trainable if trained is None else trained) | self.frozen)


def build(task: Task, mesh: Mesh, training: bool = False) -> PlacedModel:
    """Initialises the model and puts every leaf into its sharding.

    Raises:
      UserError: the trainable pattern matches nothing, or a leaf has no sharding rule.
    """
    return _place(task, task.init_for_training() if training else task.init(), mesh, jax.device_put)


def abstract(task: Task, model: nnx.Module, mesh: Mesh) -> PlacedModel:
    """As `build`, of a model that holds shapes: nothing is allocated.

    Args:
      model: as `task.init` returns it, made by `nnx.eval_shape`.
    """
    return _place(task, model, mesh, lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))


def _place(task: Task, model: nnx.Module, mesh: Mesh, put: Callable) -> PlacedModel:
    arrays = param_tree.flatten(model)
    pattern = task.trainable()
    trains = set() if pattern is None else set(patterns.select(pattern, arrays, what="trainable parameters"))
    places, notes = sharding.shardings(mesh, task.sharding_rules(), arrays)
    graph, _ = param_tree.split(row_sharding.mark(model, places))
    placed = {path: put(array, places[path]) for path, array in arrays.items()}
    return PlacedModel(
        graph,
        {path: array for path, array in placed.items() if path in trains},
        {path: array for path, array in placed.items() if path not in trains},
        places,
        notes,
    )


def own_copy(model: nnx.Module) -> nnx.Module:
    """A model that this process can run alone: of arrays that several processes share, a copy in its own memory."""
    if jax.process_count() == 1:
        return model
    graph, arrays = param_tree.split(model)
    return param_tree.merge(graph, {path: jnp.asarray(sharding.to_host(array)) for path, array in arrays.items()})


def create_state(
    placed: PlacedModel, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """The state before the first step, moments sharded as their parameters.

    Takes over the trainable arrays of the model (they are donated), so that they lie in memory once.
    """

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    places = state_shardings(make, placed, mesh)
    return jax.jit(make, out_shardings=places, donate_argnums=0)(placed.trainable)


def abstract_state(
    placed: PlacedModel, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """As `create_state`, of an abstract model."""

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    shapes, places = jax.eval_shape(make, placed.trainable), state_shardings(make, placed, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def state_shardings(make: Callable, placed: PlacedModel, mesh: Mesh) -> Any:
    """A sharding for every leaf of a state: that of the parameter whose path and shape it has, else replicated."""

    def place(keys, leaf):
        path = next((key.key for key in keys if getattr(key, "key", None) in placed.trainable), None)
        if path is not None and leaf.shape == placed.trainable[path].shape:
            return placed.shardings[path]
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, placed.trainable))
