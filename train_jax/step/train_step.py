"""The training step: gradients of the task's loss over micro-batches, the guard, the update and the metrics.

`make_train_step` returns the pure function (state, totals, frozen, batch) -> (state, totals). `trace` traces it on a
mesh, with arrays for the loop or shapes for the plan command. Random keys are a function of (seed, step, row), so the
noise does not change when a run resumes or uses another micro-batch or number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.core import metrics as metrics_lib
from train_jax.core import row_sharding
from train_jax.core.metrics import Metrics
from train_jax.optim.optimizers import Schedule
from train_jax.parallel import sharding
from train_jax.step.placement import PlacedModel
from train_jax.step.randomness import ROW, numbered, row_keys
from train_jax.step.train_state import Params, TrainState, update_guard, where

Loss = Callable[[nnx.Module, dict[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]
"""`Task.loss`: (model, micro-batch, random keys of its rows) -> (summed loss, metrics)."""
Normalizer = Callable[[dict[str, jax.Array]], jax.Array]
"""`Task.normalizer`: batch -> the scalar that divides its summed loss."""


def make_train_step(
    merge: Callable[[Params], nnx.Module],
    loss: Loss,
    normalizer: Normalizer,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    seed: int,
    ema_decay: float | None = None,
    max_bad_steps: int = 1,
) -> Callable:
    """Returns the training step as a pure function.

    Args:
      merge: returns the model for all parameters by path.
      loss: `Task.loss`.
      normalizer: `Task.normalizer`.
      optimizer: over the trainable parameters.
      schedule: learning rate by step, for the metrics.
      seed: of the random keys.
      ema_decay: decay of the moving average; None keeps no average.
      max_bad_steps: consecutive bad steps after which the guard latches.

    Returns:
      `step(state, totals, frozen, batch) -> (state, totals)`, to be jitted with the first two donated. `totals` are
      the metrics summed since the host last read them; `batch` holds arrays [A, b, ...], micro-batches first.
    """

    def step(state: TrainState, totals: Metrics, frozen: Params, batch: dict) -> tuple[TrainState, Metrics]:
        grads, value, metrics = gradient(merge, loss, normalizer, seed, state, frozen, batch)
        norm = optax.tree.norm(grads)
        guard, loss_scale, apply = update_guard(state, jnp.isfinite(value), jnp.isfinite(norm), max_bad_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = where(apply, (params, opt_state), (state.params, state.opt_state))
        ema = state.ema
        if ema is not None:
            assert ema_decay is not None, "a state with a moving average needs its decay"
            decay = ema_decay
            new_ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), ema, params)
            ema = where(apply, new_ema, ema)
        one = jnp.float32(1)
        rate = schedule(state.updates)
        metrics = metrics | {"loss": (value, one), "grad_norm": (norm, one), "learning_rate": (rate, one)}
        # A masked step does not count in the metrics.
        metrics = where(apply, metrics, metrics_lib.zeros_like(metrics))
        new = TrainState(state.step + 1, params, opt_state, ema, guard, loss_scale)
        return new, metrics_lib.add(totals, metrics)

    return step


def gradient(
    merge: Callable[[Params], nnx.Module],
    loss: Loss,
    normalizer: Normalizer,
    seed: int,
    state: TrainState,
    frozen: Params,
    batch: dict[str, jax.Array],
) -> tuple[Params, jax.Array, Metrics]:
    """Returns the float32 gradient of the loss of a whole batch, the loss, and the summed metrics.

    The gradients of micro-batches are added up. Arguments: see `make_train_step` and the step that it returns.
    """
    scale = 1.0 / jnp.maximum(normalizer(batch), 1e-8)
    batch = numbered(batch, state.step)
    keys = row_keys(seed, state.step, batch[ROW])
    loss_scale = 1.0 if state.loss_scale is None else state.loss_scale.value

    def of_micro_batch(batch, keys):
        """Returns the float32 gradient of the micro-batch's scaled loss, its share of the loss, and its metrics."""
        factor = scale * loss_scale

        def scaled_loss(params):
            value, metrics = loss(merge(params | frozen), batch, keys)
            return value * factor, (value, metrics)

        grads, (value, metrics) = jax.grad(scaled_loss, has_aux=True)(state.params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), value * scale, metrics

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, of_micro_batch(*inputs)), None

    total = of_micro_batch(jax.tree.map(lambda x: x[0], batch), keys[0])
    if len(batch[ROW]) > 1:
        total, _ = jax.lax.scan(add, total, jax.tree.map(lambda x: x[1:], (batch, keys)))
    grads, value, metrics = total
    return jax.tree.map(lambda g: g / loss_scale, grads), value, metrics


def trace(
    config: ConfigDict,
    loss: Loss,
    normalizer: Normalizer,
    mesh: Mesh,
    placed: PlacedModel,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    start: TrainState,
    batch: dict[str, Any],
) -> tuple[jax.stages.Traced, dict[str, Any]]:
    """Traces the training step of a loss.

    Args:
      config: of the run; its seed, ema_decay and max_bad_steps are used.
      loss: `Task.loss`.
      normalizer: `Task.normalizer`.
      mesh: of the model.
      placed: the model.
      optimizer: over the trainable parameters.
      schedule: learning rate by step, for the metrics.
      start: the state, as arrays or as shapes with shardings.
      batch: arrays [A, b, ...], or shapes with shardings.

    Returns:
      The traced step, called as `step(state, totals, placed.frozen, batch)`, whose results have the shardings of its
      arguments; and `totals` (metrics.Metrics) as shapes.
    """
    step = make_train_step(
        placed.merge,
        loss,
        normalizer,
        optimizer,
        schedule,
        seed=config.seed,
        ema_decay=config.ema_decay,
        max_bad_steps=config.max_bad_steps,
    )

    def loss_metrics(start, frozen, batch):
        first = jax.tree.map(lambda x: x[0], numbered(batch, start.step))
        keys = row_keys(config.seed, start.step, first[ROW])
        return loss(placed.merge(start.params | frozen), first, keys)[1]

    names = jax.eval_shape(row_sharding.with_mesh(mesh, loss_metrics), start, placed.frozen, batch)
    names = [*names, "loss", "grad_norm", "learning_rate"]
    replicated = sharding.replicated(mesh)
    totals = sharding.with_shardings(jax.eval_shape(lambda: metrics_lib.zeros_like(names)), lambda leaf: replicated)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (start, totals))
    jitted = jax.jit(row_sharding.with_mesh(mesh, step), donate_argnums=(0, 1), out_shardings=shardings)
    return jitted.trace(start, totals, placed.frozen, batch), totals
