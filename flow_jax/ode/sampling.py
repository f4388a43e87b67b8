"""Sampling: from noise at t = 0 to data at t = 1 along a velocity field, or back."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_function
from flow_jax.arrays import CheckedRows, Number, as_rows, check_args, velocity_at
from flow_jax.ode.integrate import FIXED, MAX_STEPS, TOLERANCE, Plan, integrate
from train_jax.core.errors import UserError


class SampleResult(NamedTuple):
    """Samples and what they cost.

    Attributes:
      x: [B, ...] at the last time.
      nfe: evaluations of the velocity: a scalar, or [B] if each row has its own steps.
      times: [T] of the trajectory, or None.
      trajectory: [T, B, ...], or None.
    """

    x: Float[Array, "B ..."]
    nfe: Int[Array, "*rows"]
    times: Float[Array, " T"] | None
    trajectory: Float[Array, "T B ..."] | None


def sample(
    velocity: Callable,
    x_0: CheckedRows,
    solver: str = "tsit5",
    num_steps: int | None = None,
    rtol: Number = TOLERANCE,
    atol: Number = TOLERANCE,
    t0: Number = 0.0,
    t1: Number = 1.0,
    per_sample: bool = False,
    *,
    times=None,
    trajectory: bool = False,
    args: tuple = (),
    max_steps: int = MAX_STEPS,
) -> SampleResult:
    """Integrates dx/dt = velocity(t, x) from x_0.

    Args:
      velocity: function (t, x, *args) -> velocity of x's shape, with a scalar t and x [B, ...]. An `nnx.Module` with
        this call, a bound method of one, or a partial of these compiles once whatever its weights; a function over a
        module compiles at every call (callables.py has the rule). Its weights are those it has when this is called.
      x_0: noise [B, ...] at t0; or data, with t0=1 and t1=0, to find the noise it comes from.
      solver: "euler", "midpoint", "heun", "rk4" (Kutta's 3/8 rule) with fixed steps; "dopri5", "tsit5", "dopri8" with
        steps chosen by tolerance.
      num_steps: equal steps of a fixed solver.
      rtol, atol: local tolerance of an adaptive solver; the global error is larger.
      t0, t1: start and end.
      per_sample: False: one step for the whole batch, by the root mean square of all errors. It is the cheaper one, but
        rows depend on their batch mates up to the tolerance, and single rows may be off by far more than it (1e-2 at
        1e-5 was seen among 10,000). True: each row has its own steps, and is the same in any batch.
      times: the steps of a fixed solver (times.uniform_grid, times.edm_grid, or any), or with `trajectory` where to
        look at an adaptive one; they replace t0 and t1.
      trajectory: keep x at every time; of an adaptive solver at `times`.
      args: arrays of rows [B, ...] passed on to the velocity, labels say.
      max_steps: of an adaptive solver.

    Raises:
      UserError: arguments that contradict each other or have no effect; a velocity that is not of x's shape, or `args`
        of other numbers of rows.
      RuntimeError: an adaptive solver failed.
    """
    check_function("velocity", velocity)
    x_0 = as_rows("x_0", x_0)
    check_args(args, x_0)
    plan = Plan.make(solver, num_steps, rtol, atol, t0, t1, per_sample, times, max_steps)
    if solver not in FIXED and trajectory != (times is not None):
        raise UserError(
            f"solver={solver!r} keeps a trajectory at the times it is told: pass trajectory=True and times together."
        )
    r = integrate(functools.partial(velocity_at, velocity), x_0, args, plan, trajectory)
    kept = jnp.asarray(plan.times, jnp.promote_types(r.state.dtype, jnp.float32)) if trajectory else None
    return SampleResult(r.state, r.nfe, kept, r.trajectory)
