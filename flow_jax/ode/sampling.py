"""Samples from a flow: integrates a velocity from noise at t = 0 to data at t = 1, or back."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_function
from flow_jax.arrays import CheckedBatch, Number, as_rows, check_args, velocity_at
from flow_jax.ode.integrate import FIXED, MAX_STEPS, TOLERANCE, SolverSettings, integrate
from train_jax.core.errors import UserError


class SampleResult(NamedTuple):
    """Samples, and the number of evaluations of the velocity.

    Attributes:
      x: [B, ...] at the last time.
      nfe: number of evaluations of the velocity: a scalar, or [B] if each row has its own steps.
      times: [T] the times of the trajectory, or None.
      trajectory: [T, B, ...] x at these times, or None.
    """

    x: Float[Array, "B ..."]
    nfe: Int[Array, "*rows"]
    times: Float[Array, " T"] | None
    trajectory: Float[Array, "T B ..."] | None


def sample(
    velocity: Callable,
    x_0: CheckedBatch,
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
    """Returns the solution at t1 of dx/dt = velocity(t, x) with x(t0) = x_0: samples, where x_0 is noise.

    Args:
      velocity: function (t, x, *args) -> velocity of x's shape, with a scalar t and x [B, ...]. An `nnx.Module` with
        this call, a bound method of one, or a partial of these is compiled once, whatever its weights; a function that
        reads a module is compiled at every call (see callables.py). The current weights are always used.
      x_0: noise [B, ...] at t0; or data with t0=1 and t1=0, to find the noise that the flow maps to it.
      solver: "euler", "midpoint", "heun" or "rk4" (Kutta's 3/8 rule) with fixed steps; "dopri5", "tsit5" or "dopri8"
        with adaptive steps.
      num_steps: number of equal steps of a fixed solver.
      rtol, atol: local tolerance of an adaptive solver; the global error is larger.
      t0, t1: start and end.
      per_sample: False: one step size for the whole batch, chosen by the root mean square of all errors. This is
        cheaper, but a row's result depends on the other rows, up to the tolerance, and the error of a single row may be
        far larger (1e-2 at tolerance 1e-5 among 10,000 rows was seen). True: each row has its own steps and is the same
        in any batch.
      times: the steps of a fixed solver (times.uniform_grid, times.edm_grid, or any), or with `trajectory` the times at
        which an adaptive solver saves x; they replace t0 and t1.
      trajectory: also return x at all times; for an adaptive solver at `times`.
      args: arrays [B, ...] that are passed to the velocity, such as labels.
      max_steps: limit of an adaptive solver.

    Returns:
      A `SampleResult`; x has the shape and float dtype of x_0.

    Raises:
      UserError: arguments contradict each other or have no effect; the velocity does not have x's shape, or an array in
        `args` does not have B rows.
      RuntimeError: an adaptive solver failed.
    """
    check_function("velocity", velocity)
    x_0 = as_rows("x_0", x_0)
    check_args(args, x_0)
    settings = SolverSettings.make(solver, num_steps, rtol, atol, t0, t1, per_sample, times, max_steps)
    if solver not in FIXED and trajectory != (times is not None):
        raise UserError(
            f"solver={solver!r} saves a trajectory at given times: pass trajectory=True and times together."
        )
    r = integrate(functools.partial(velocity_at, velocity), x_0, args, settings, trajectory)
    saved_times = jnp.asarray(settings.times, jnp.promote_types(r.state.dtype, jnp.float32)) if trajectory else None
    return SampleResult(r.state, r.nfe, saved_times, r.trajectory)
