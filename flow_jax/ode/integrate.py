"""Integrates dx/dt = field(t, x), with fixed steps by a scan or adaptive steps by diffrax.

`SolverSettings` checks all options before anything is compiled. A program is compiled once for each field
(callables.py), shape and solver; weights, times and tolerances are its arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from flow_jax.argument_checks import check_number, check_numbers, check_whole, is_traced
from flow_jax.arrays import Number
from flow_jax.callables import run
from train_jax.core.errors import UserError


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: nodes c, matrix a, weights b, and its order of convergence."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int


FIXED = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "midpoint": Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0), 2),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2), 2),  # the explicit trapezoid
    # Kutta's 3/8 rule, as in torchdiffeq's "rk4".
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4
    ),
}
ADAPTIVE = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5, "dopri8": diffrax.Dopri8}
TOLERANCE = 1e-5
MAX_STEPS = 4096  # of an adaptive solver


@dataclasses.dataclass(frozen=True)
class SolverSettings:
    """The options of an integration, checked.

    Attributes:
      solver: a key of FIXED or ADAPTIVE.
      times: [T] from start to end: the steps of a fixed solver, or the times at which an adaptive one saves the state.
      rtol, atol: relative and absolute tolerance of an adaptive solver.
      per_sample: each row has its own steps.
      max_steps: limit of an adaptive solver, including rejected steps.
    """

    solver: str
    times: np.ndarray
    rtol: Number
    atol: Number
    per_sample: bool
    max_steps: int

    @classmethod
    def make(
        cls,
        solver: str,
        num_steps: int | None,
        rtol: Number,
        atol: Number,
        t0: Number,
        t1: Number,
        per_sample: bool,
        times=None,
        max_steps: int = MAX_STEPS,
        *,
        ends: tuple[Number, Number] = (0.0, 1.0),
    ) -> "SolverSettings":
        """Checks the arguments of `sample` and `log_prob`, whose defaults of (t0, t1) are `ends`.

        Raises:
          UserError: the solver is unknown, or arguments contradict each other or have no effect.
        """
        if num_steps is not None:
            check_whole("num_steps", num_steps)
        for name, number in dict(rtol=rtol, atol=atol).items():
            check_number(name, number, 0.0)
        for name, number in dict(t0=t0, t1=t1).items():
            check_number(name, number)
        check_whole("max_steps", max_steps)
        if not isinstance(solver, str) or solver not in (*FIXED, *ADAPTIVE):
            raise UserError(f"solver={solver!r} is unknown, expected one of {', '.join([*FIXED, *ADAPTIVE])}.")
        settings = cls(solver, _grid(solver, num_steps, t0, t1, times, ends), rtol, atol, per_sample, max_steps)
        (_check_fixed if solver in FIXED else _check_adaptive)(settings)
        return settings


def _check_fixed(settings: SolverSettings) -> None:
    """Raises UserError for settings that have no effect on a solver of fixed steps."""
    fixed, others = f"solver={settings.solver!r} has fixed steps", f"choose one of {', '.join(ADAPTIVE)}"
    rtol, atol = settings.rtol, settings.atol
    if (rtol, atol) != (TOLERANCE, TOLERANCE):
        raise UserError(f"{fixed}, so rtol={rtol:g} and atol={atol:g} have no effect: leave them out, or {others}.")
    if settings.max_steps != MAX_STEPS:
        raise UserError(f"{fixed}, so max_steps={settings.max_steps} has no effect: leave it out.")
    if settings.per_sample:
        raise UserError(f"{fixed}, the same for every row: leave out per_sample, or {others}.")


def _check_adaptive(settings: SolverSettings) -> None:
    """Raises UserError for settings by which an adaptive solver cannot choose its steps."""
    rtol, atol = settings.rtol, settings.atol
    if max(rtol, atol) == 0:
        raise UserError(f"rtol={rtol:g} and atol={atol:g} give no tolerance, expected numbers >= 0, not both 0.")


def _grid(solver: str, num_steps: int | None, t0: Number, t1: Number, times, ends: tuple[Number, Number]) -> np.ndarray:
    """Returns the times of the settings, in float64. Raises UserError."""
    if solver in FIXED and (num_steps is None) == (times is None):
        given = "neither" if times is None else "both"
        raise UserError(f"solver={solver!r} has fixed steps: pass num_steps or times, one of them (got {given}).")
    if solver in ADAPTIVE and num_steps is not None:
        raise UserError(
            f"solver={solver!r} chooses its steps by tolerance: leave out num_steps={num_steps}, or choose one of "
            f"{', '.join(FIXED)}."
        )
    if times is None:
        if t0 == t1:
            raise UserError(f"t0 and t1 are both {t0:g}: there is nothing to integrate.")
        return np.linspace(t0, t1, (num_steps or 1) + 1)
    if (t0, t1) != ends:
        raise UserError(f"times say where to start and end: leave out t0={t0:g} and t1={t1:g}.")
    check_numbers("times", times)
    times = np.asarray(times, np.float64)
    steps = np.diff(np.atleast_1d(times))
    ordered = (steps > 0).all() or (steps < 0).all()
    if times.ndim != 1 or len(times) < 2 or not ordered or not np.isfinite(times).all():
        raise UserError("times must be two or more numbers in one row, all increasing or all decreasing.")
    return times


class Integration(NamedTuple):
    """The result of an integration.

    Attributes:
      state: the state at the end.
      nfe: number of evaluations of the field; [B] if each row has its own steps.
      trajectory: the states at all times, or None.
      success: whether the end was reached with finite numbers; [B] if each row has its own steps.
    """

    state: Any
    nfe: Int[Array, "*rows"]
    trajectory: Any
    success: Bool[Array, "*rows"]


def integrate(function: Callable, state: Any, args: tuple, settings: SolverSettings, trajectory: bool) -> Integration:
    """Integrates a pytree of arrays [B, ...].

    Args:
      function: (t, state, *args) -> derivative of the state, with its structure and shapes.
      state: the state at the first time.
      args: arrays [B, ...] that are passed to the function, such as labels.
      settings: solver and times.
      trajectory: also return the states at all times, on a new leading axis.

    Raises:
      UserError: as the function; or the state of an adaptive solver is empty.
      RuntimeError: an adaptive solver reached max_steps, or numbers that are not finite. Under `jax.jit` the result is
        NaN instead.
    """
    solver, max_steps = settings.solver, settings.max_steps
    dtype = jnp.promote_types(jax.tree.leaves(state)[0].dtype, jnp.float32)
    times = jnp.asarray(settings.times, dtype)
    if solver in FIXED:
        return run(_fixed, function, (solver, trajectory), state, args, times)
    if not all(leaf.size for leaf in jax.tree.leaves(state)):
        shapes = ", ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(state))
        raise UserError(
            f"{solver} cannot choose its steps for shapes {shapes}, which are empty: leave out empty batches."
        )
    solve = _adaptive_rows if settings.per_sample else _adaptive
    static = (solver, trajectory, max_steps)
    result = run(solve, function, static, state, args, times, settings.rtol, settings.atol)
    if not is_traced(result.success) and not result.success.all():
        raise RuntimeError(
            f"{solver} did not reach the end within {max_steps} steps, or met numbers that are not finite: check the "
            "velocity, loosen rtol and atol, or raise max_steps."
        )
    return result


def _fixed(field, solver: str, keep: bool, arrays, state, args, times) -> Integration:
    tableau = FIXED[solver]

    def add(x, dt, weights, slopes):
        """Returns x + dt sum_k w_k slope_k, in the dtype of x."""
        terms = [(w, slope) for w, slope in zip(weights, slopes, strict=True) if w]

        def leaf(x, *slopes):
            return x + dt.astype(x.dtype) * sum(w * s.astype(x.dtype) for (w, _), s in zip(terms, slopes, strict=True))

        return jax.tree.map(leaf, x, *(slope for _, slope in terms)) if terms else x

    def step(x, ends):
        t, dt = ends[0], ends[1] - ends[0]
        slopes = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            slopes.append(field(arrays, t + c * dt, add(x, dt, row, slopes), *args))
        x = add(x, dt, tableau.b, slopes)
        return x, x if keep else None

    end, path = lax.scan(step, state, (times[:-1], times[1:]))
    if keep:
        path = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, path)
    nfe = jnp.int32((len(times) - 1) * len(tableau.c))
    return Integration(end, nfe, path, jnp.array(True))


def _adaptive(field, solver: str, keep: bool, max_steps: int, arrays, state, args, times, rtol, atol) -> Integration:
    """Integrates with one step size for all rows, chosen by the root mean square of the errors of all entries."""

    def function(t, x, _):
        return jax.tree.map(lambda dx, x: dx.astype(x.dtype), field(arrays, t, x, *args), x)

    jax.eval_shape(function, times[0], state, None)  # raises the function's errors outside of diffrax
    method = ADAPTIVE[solver]()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(function),
        method,
        times[0],
        times[-1],
        None,
        state,
        saveat=diffrax.SaveAt(ts=times, t1=True) if keep else diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        throw=False,
    )
    success = solution.result == diffrax.RESULTS.successful
    ys = jax.tree.map(lambda y: jnp.where(success, y, jnp.nan), solution.ys)
    # All of these methods reuse the last evaluation of a step as the first one of the next.
    nfe = solution.stats["num_steps"] * (method.tableau.num_stages - 1) + 1
    end = jax.tree.map(lambda y: y[-1], ys)
    return Integration(end, nfe, jax.tree.map(lambda y: y[:-1], ys) if keep else None, success)


def _adaptive_rows(
    field, solver: str, keep: bool, max_steps: int, arrays, state, args, times, rtol, atol
) -> Integration:
    """Integrates each row with its own steps: a batch of one row in every lane of a vmap."""
    jax.eval_shape(field, arrays, times[0], state, *args)  # raises errors with the shapes of the whole batch

    def one(row, args):
        row, args = jax.tree.map(lambda leaf: leaf[None], (row, args))
        r = _adaptive(field, solver, keep, max_steps, arrays, row, args, times, rtol, atol)
        path = jax.tree.map(lambda y: y[:, 0], r.trajectory)
        return Integration(jax.tree.map(lambda y: y[0], r.state), r.nfe, path, r.success)

    r = jax.vmap(one)(state, args)
    return r._replace(trajectory=jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), r.trajectory))
