"""Models with random weights and the sizes of a released model ("random:3b-224"), to measure memory and speed."""

import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx
from jax import lax

from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.weights.checkpoint import Config, whole_model
from paligemma_jax.weights.name_table import stacked
from train_jax.core import param_tree

Arrays = dict[str, jax.Array]
Finish = Callable[[nnx.Module], nnx.Module]


def random_arrays(
    config: Config, finish: Finish, shardings: Mapping[str, jax.sharding.Sharding | None], seed: int = 0
) -> Arrays:
    """Returns random parameters by path, created with their final sharding.

    Layers are drawn and finished one after another, so the temporary memory does not grow with the depth.

    Args:
      config: of the model.
      finish: applied to a new model in place, layer by layer (quantisation, or nothing).
      shardings: sharding of every leaf of the finished model, None for the default device.
      seed: of the weights.
    """
    arrays = {}
    for draw in draws(config, finish):
        drawn = jax.eval_shape(draw, jax.random.key(seed))
        arrays |= jax.jit(draw, out_shardings={path: shardings[path] for path in drawn})(jax.random.key(seed))
    return arrays


def draws(config: Config, finish: Finish) -> list[Callable[[jax.Array], Arrays]]:
    """Returns functions of a key, for `jax.jit`, that draw the leaves without layers, and each tower's layers."""
    depths = {tower: getattr(config, tower).depth for tower in _towers(config)}
    towers = [functools.partial(_layers, config, finish, tower, depth) for tower, depth in depths.items()]
    return [functools.partial(_others, config, finish), *towers]


def _towers(config: Config) -> tuple[str, str]:
    """Returns the names of the towers with layers, in the config and in paths."""
    return "vision", "text" if isinstance(config, DualEncoderConfig) else "decoder"


def _layers(config: Config, finish: Finish, tower: str, depth: int, key: jax.Array) -> Arrays:
    """Draws the stacked leaves of one tower."""

    def layer(key: jax.Array) -> Arrays:
        arrays = _one_layer(config, finish, key)
        return {path: array[0] for path, array in arrays.items() if stacked(path) and path.startswith(f"{tower}/")}

    return lax.map(layer, jax.random.split(key, depth))


def _others(config: Config, finish: Finish, key: jax.Array) -> Arrays:
    """Draws the leaves that have no layers."""
    return {path: array for path, array in _one_layer(config, finish, key).items() if not stacked(path)}


def _one_layer(config: Config, finish: Finish, key: jax.Array) -> Arrays:
    """Draws a model with one layer per tower; the compiler drops the leaves that a caller does not use."""
    config = config.replace(**{tower: dict(depth=1) for tower in _towers(config)})
    return param_tree.flatten(finish(whole_model(config, nnx.Rngs(key))))
