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
class Bundle:
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


def build(task: Task, mesh: Mesh) -> Bundle:
    """Initialises the model and puts every leaf into its sharding.

    Raises:
      UserError: the trainable pattern matches nothing, or a leaf has no sharding rule.
    """
    return _bundle(task, task.init(), mesh, jax.device_put)


def abstract(task: Task, model: nnx.Module, mesh: Mesh) -> Bundle:
    """As `build`, of a model that holds shapes: nothing is allocated.

    Args:
      model: as `task.init` returns it, made by `nnx.eval_shape`.
    """
    return _bundle(task, model, mesh, lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))


def _bundle(task: Task, model: nnx.Module, mesh: Mesh, put: Callable) -> Bundle:
    arrays = param_tree.flatten(model)
    pattern = task.trainable()
    trains = set() if pattern is None else set(patterns.select(pattern, arrays, what="trainable parameters"))
    places, notes = sharding.shardings(mesh, task.sharding_rules(), arrays)
    graph, _ = param_tree.split(row_sharding.mark(model, places))
    placed = {path: put(array, places[path]) for path, array in arrays.items()}
    return Bundle(
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
    bundle: Bundle, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """The state before the first step, moments sharded as their parameters.

    Takes over the trainable arrays of the bundle (they are donated), so that they lie in memory once.
    """

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    places = state_shardings(make, bundle, mesh)
    return jax.jit(make, out_shardings=places, donate_argnums=0)(bundle.trainable)


def abstract_state(
    bundle: Bundle, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> train_state.TrainState:
    """As `create_state`, of an abstract bundle."""

    def make(trainable):
        return train_state.create(trainable, optimizer, **options)

    shapes, places = jax.eval_shape(make, bundle.trainable), state_shardings(make, bundle, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def state_shardings(make: Callable, bundle: Bundle, mesh: Mesh) -> Any:
    """A sharding for every leaf of a state: that of the parameter whose path and shape it has, else replicated."""

    def place(keys, leaf):
        path = next((key.key for key in keys if getattr(key, "key", None) in bundle.trainable), None)
        if path is not None and leaf.shape == bundle.trainable[path].shape:
            return bundle.shardings[path]
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, bundle.trainable))
