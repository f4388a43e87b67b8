"""The training step of a run, ready to be compiled: over arrays by the loop, over shapes by the plan command."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.core import metrics, row_sharding
from train_jax.optim.optimizers import Schedule
from train_jax.parallel import sharding
from train_jax.step import train_state
from train_jax.step.placement import Bundle
from train_jax.task import Task


def trace(
    config: ConfigDict,
    task: Task,
    mesh: Mesh,
    bundle: Bundle,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    start: train_state.TrainState,
    batch: dict[str, Any],
) -> tuple[jax.stages.Traced, dict[str, Any]]:
    """The step of train_jax.step.train_state over this model, traced.

    Args:
      start: the state, arrays or shapes with their shardings.
      batch: arrays or shapes [A, b, ...] with their shardings.

    Returns:
      The traced step, called as `step(state, totals, bundle.frozen, batch)`, whose results lie as its arguments do;
      and the shapes of `totals` (metrics.Metrics).
    """
    step = train_state.make_train_step(
        bundle.merge,
        task.loss,
        task.normalizer,
        optimizer,
        schedule,
        seed=config.seed,
        ema_decay=config.ema_decay,
        max_bad_steps=config.max_bad_steps,
    )

    def measured(start, frozen, batch):
        first = jax.tree.map(lambda x: x[0], train_state.numbered(batch, start.step))
        keys = train_state.row_keys(config.seed, start.step, jax.tree.leaves(first)[0].shape[0])
        return task.loss(bundle.merge(start.params | frozen), first, keys)[1]

    names = jax.eval_shape(row_sharding.within(mesh, measured), start, bundle.frozen, batch)
    names = [*names, "loss", "grad_norm", "learning_rate"]
    whole = sharding.replicated(mesh)
    totals = sharding.with_shardings(jax.eval_shape(lambda: metrics.zeros_like(names)), lambda leaf: whole)
    places = jax.tree.map(lambda leaf: leaf.sharding, (start, totals))
    jitted = jax.jit(row_sharding.within(mesh, step), donate_argnums=(0, 1), out_shardings=places)
    return jitted.trace(start, totals, bundle.frozen, batch), totals
