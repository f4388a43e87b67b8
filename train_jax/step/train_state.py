"""What a training step changes: parameters, optimizer state, moving average, and the guard against faults.

Faults are handled on the device, without asking the host:

  - a non-finite loss or gradient masks the update: parameters and optimizer state stay as they are;
  - after `max_bad_steps` faults in a row the guard latches, and every later step is masked too, until the host looks;
  - in float16 a non-finite gradient under a finite loss halves the loss scale instead, and is counted apart.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]
Leaf = Any  # an array; or whatever JAX puts in its place in a tree: shapes, shardings, "unspecified"


def _pytree(cls):
    """A frozen dataclass whose fields are pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls, [field.name for field in dataclasses.fields(cls)], [])


@_pytree
class Guard:
    """Faults seen so far; int32 scalars."""

    in_a_row: Leaf
    total: Leaf
    first_bad: Leaf  # step of the first fault of the current row, -1 for none
    stopped: Leaf  # bool: too many in a row, all further updates are masked
    scale_skips: Leaf  # updates skipped because the float16 loss scale was too large

    @classmethod
    def clean(cls) -> "Guard":
        zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  (one buffer each: donated arrays must not alias)
        return cls(zero(), zero(), zero() - 1, jnp.zeros((), bool), zero())


@_pytree
class LossScale:
    """Dynamic loss scale of float16 (Micikevicius et al. 2018): doubles after INTERVAL good steps or halves."""

    value: Leaf  # float32
    good_steps: Leaf  # int32, since the last change

    INTERVAL = 1000
    SMALLEST = 1.0

    @classmethod
    def start(cls, value: float = 2.0**15) -> "LossScale":
        return cls(jnp.float32(value), jnp.zeros((), jnp.int32))

    def update(self, finite: jax.Array) -> "LossScale":
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= self.INTERVAL
        value = jnp.where(finite, jnp.where(grow, self.value * 2, self.value), self.value / 2)
        return LossScale(jnp.maximum(value, self.SMALLEST), jnp.where(grow, 0, good))


@_pytree
class TrainState:
    """Everything a step changes. Frozen parameters are not part of it."""

    step: Leaf  # int32, updates attempted so far
    params: Leaf | dict[str, Leaf]  # trainable
    opt_state: Any
    ema: Leaf | dict[str, Leaf] | None  # moving average of params, not yet debiased
    guard: Leaf | Guard
    loss_scale: Leaf | LossScale | None  # float16 only

    @property
    def updates(self) -> jax.Array:
        """Updates applied so far (while the guard has not stopped), which the optimizer's schedule counts too."""
        return self.step - self.guard.total - self.guard.scale_skips


def create(params: Params, optimizer: optax.GradientTransformation, *, ema: bool, float16: bool) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) if ema else None,
        guard=Guard.clean(),
        loss_scale=LossScale.start() if float16 else None,
    )


def debias_ema(ema: Params, decay: float, updates: int | jax.Array, params: Params) -> Params:
    """The moving average without its bias towards the zero start, in the parameters' dtypes.

    Args:
      ema: sum over updates i of `(1 - decay) * decay ** (updates - i) * params_i`.
      decay: a Python number: 1 - 0.9999 taken in float32 would be wrong by 5e-4.
      updates: how many were applied; before the first the average is that of `params` alone.
      params: the current parameters.
    """
    weight = -jnp.expm1(updates * jnp.log1p(decay - 1.0))  # 1 - decay ** updates
    average = {path: jnp.where(updates > 0, ema[path] / weight, params[path]) for path in params}
    return {path: average[path].astype(params[path].dtype) for path in params}


def update_guard(
    state: TrainState, finite_loss: jax.Array, finite_grads: jax.Array, max_bad_steps: int
) -> tuple[Guard, LossScale | None, jax.Array]:
    """What the step's loss and gradient norm mean: the new guard, the new loss scale, whether to apply the update."""
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
    """Leaf by leaf: `new` if the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
