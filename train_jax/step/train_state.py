"""The state that a training step changes: parameters, optimizer state, moving average, and the guard.

The guard handles non-finite values on the device, without a transfer to the host:

  - a non-finite loss or gradient masks the update: parameters and optimizer state do not change;
  - after `max_bad_steps` bad steps in a row the guard latches and masks every later step, until the host reads it;
  - in float16, a non-finite gradient with a finite loss halves the loss scale instead and is counted separately.
"""

import dataclasses
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]
StateLeaf = Any  # an array, or what JAX puts in place of arrays in a tree: shapes, shardings, "unspecified"


@dataclass_transform(frozen_default=True)
def _pytree(cls):
    """Makes a frozen dataclass whose fields are pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls, [field.name for field in dataclasses.fields(cls)], [])


@_pytree
class Guard:
    """Counts of bad steps; int32 scalars."""

    in_a_row: StateLeaf
    total: StateLeaf
    first_bad: StateLeaf  # first of the latest consecutive bad steps, -1 if the last step was good
    stopped: StateLeaf  # bool: too many in a row, all further updates are masked
    scale_skips: StateLeaf  # updates skipped because the float16 loss scale was too large

    @classmethod
    def clean(cls) -> "Guard":
        """Returns the guard before the first step."""

        def zero():  # a new buffer each time: donated arrays must not alias
            return jnp.zeros((), jnp.int32)

        return cls(zero(), zero(), zero() - 1, jnp.zeros((), bool), zero())


@_pytree
class LossScale:
    """Dynamic loss scale of float16 (Micikevicius et al. 2018): doubles after INTERVAL good steps, or halves."""

    value: StateLeaf  # float32
    good_steps: StateLeaf  # int32, since the last change

    INTERVAL = 1000
    SMALLEST = 1.0

    @classmethod
    def start(cls, value: float = 2.0**15) -> "LossScale":
        """Returns the loss scale before the first step."""
        return cls(jnp.float32(value), jnp.zeros((), jnp.int32))

    def update(self, finite: jax.Array) -> "LossScale":
        """Returns the loss scale after a step whose gradient was finite or not (bool scalar)."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= self.INTERVAL
        value = jnp.where(finite, jnp.where(grow, self.value * 2, self.value), self.value / 2)
        return LossScale(jnp.maximum(value, self.SMALLEST), jnp.where(grow, 0, good))


@_pytree
class TrainState:
    """Everything that a step changes; frozen parameters are not part of it."""

    step: StateLeaf  # int32, updates attempted so far
    params: StateLeaf | dict[str, StateLeaf]  # trainable
    opt_state: Any
    ema: StateLeaf | dict[str, StateLeaf] | None  # moving average of params, not yet debiased
    guard: StateLeaf | Guard
    loss_scale: StateLeaf | LossScale | None  # float16 only

    @property
    def updates(self) -> jax.Array:
        """Number of updates applied before the guard stopped, which is also the count of the optimizer's schedule."""
        return self.step - self.guard.total - self.guard.scale_skips


def create(params: Params, optimizer: optax.GradientTransformation, *, ema: bool, float16: bool) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: trainable parameters by path.
      optimizer: over `params`.
      ema: whether to keep a moving average of the parameters.
      float16: whether to scale the loss.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) if ema else None,
        guard=Guard.clean(),
        loss_scale=LossScale.start() if float16 else None,
    )


def debias_ema(ema: Params, decay: float, updates: int | jax.Array, params: Params) -> Params:
    """Returns the moving average corrected for its start at zero, in the parameters' dtypes.

    Args:
      ema: sum over updates i of `(1 - decay) * decay ** (updates - i) * params_i`.
      decay: a Python float: 1 - 0.9999 computed in float32 would have a relative error of 5e-4.
      updates: number of updates applied; before the first the result is `params`.
      params: the current parameters.
    """
    weight = -jnp.expm1(updates * jnp.log1p(decay - 1.0))  # 1 - decay ** updates
    average = {path: jnp.where(updates > 0, ema[path] / weight, params[path]) for path in params}
    return {path: average[path].astype(params[path].dtype) for path in params}


def update_guard(
    state: TrainState, finite_loss: jax.Array, finite_grads: jax.Array, max_bad_steps: int
) -> tuple[Guard, LossScale | None, jax.Array]:
    """Updates the guard and the loss scale after a step's loss and gradient.

    Args:
      state: before the step.
      finite_loss: bool scalar, whether the loss is finite.
      finite_grads: bool scalar, whether the gradient is finite.
      max_bad_steps: consecutive bad steps after which the guard latches.

    Returns:
      The new guard, the new loss scale, and whether to apply the update (bool scalar).
    """
    guard, scale = state.guard, state.loss_scale
    overflow = jnp.zeros((), bool)
    if scale is not None:
        overflow = finite_loss & ~finite_grads & (scale.value > LossScale.SMALLEST)
        scale = where(finite_loss & ~guard.stopped, scale.update(finite_grads), scale)
    bad = ~(finite_loss & finite_grads) & ~overflow & ~guard.stopped
    in_a_row = jnp.where(guard.stopped | overflow, guard.in_a_row, jnp.where(bad, guard.in_a_row + 1, 0))
    fresh = bad & (guard.in_a_row == 0)
    new = Guard(
        in_a_row=in_a_row,
        total=guard.total + bad,
        first_bad=jnp.where(fresh, state.step, jnp.where(in_a_row == 0, -1, guard.first_bad)),
        stopped=guard.stopped | (in_a_row >= max_bad_steps),
        scale_skips=guard.scale_skips + overflow,
    )
    return new, scale, finite_loss & finite_grads & ~guard.stopped


def where(condition: jax.Array, new, old):
    """Returns `new` if the condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
