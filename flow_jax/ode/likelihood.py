"""Likelihood of data under a flow, by the instantaneous change of variables (Chen et al. 2018; Grathwohl et al. 2019).

log p(x_1) = log p_0(x_0) - int_0^1 div v(t, x_t) dt along the trajectory that ends in x_1, integrated from t = 1 to 0.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from flow_jax.argument_checks import check_function, check_number, check_numbers, check_whole, is_traced
from flow_jax.arrays import (
    AnyArray,
    BatchArray,
    CheckedBatch,
    Number,
    RandomKey,
    as_rows,
    check_args,
    check_shapes,
    float_dtype,
    full_dtype,
    sum_rows,
    velocity_at,
)
from flow_jax.callables import call_now
from flow_jax.ode.integrate import ADAPTIVE, MAX_STEPS, TOLERANCE, SolverSettings, integrate
from flow_jax.row_keys import RowKeys, row_keys, stream
from train_jax.core.errors import UserError

DIVERGENCES = ("exact", "hutchinson")
PROBES = {
    "rademacher": lambda key, shape, dtype: jax.random.rademacher(key, shape, dtype),
    "gaussian": lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
}


class LogProbResult(NamedTuple):
    """The log-likelihood of data under a flow.

    Attributes:
      log_prob: [B] in nats; with Hutchinson's divergence an unbiased estimate, up to the solver's error.
      x_0: [B, ...] the noise that the flow maps to the data.
      nfe: number of joint evaluations of velocity and divergence: a scalar, or [B] if each row has its own steps.
    """

    log_prob: Float[Array, " B"]
    x_0: Float[Array, "B ..."]
    nfe: Int[Array, "*rows"]


def standard_normal_log_prob(x: BatchArray) -> Float[Array, " B"]:
    """Returns log N(x; 0, I), summed over the entries of an example."""
    x = jnp.asarray(x, full_dtype(x))
    return -0.5 * sum_rows(x**2) - 0.5 * math.log(2 * math.pi) * math.prod(x.shape[1:])


def start_log_prob(start: Callable) -> Callable:
    """Returns the log-density x -> [B] of start(x_0) for standard normal x_0: the prior of a path that starts there.

    Args:
      start: `path.start`, which must be a scale times x_0 plus a shift, entry by entry.
    """

    def prior(x):
        mean = call_now(start, jnp.zeros_like(x))
        std = call_now(start, jnp.ones_like(x)) - mean
        return standard_normal_log_prob((x - mean) / std) - sum_rows(jnp.log(std))

    return prior


def exact_divergence(velocity: Callable, x: BatchArray, chunk: int = 64) -> tuple[Array, Float[Array, " B"]]:
    """Returns a velocity [B, ...] and its divergence [B], by one Jacobian-vector product for each entry of an example.

    Args:
      velocity: x -> velocity, in which rows are independent of each other.
      x: [B, ...].
      chunk: number of products computed at once.

    Raises:
      UserError: the velocity does not have x's shape.
    """
    check_whole("chunk", chunk)
    x = as_rows("x", x)
    value, push = jax.linearize(functools.partial(call_now, velocity), x)
    check_shapes("x", x, "the velocity", value)
    size = math.prod(x.shape[1:])

    def diagonal(index):
        tangent = jnp.zeros((len(x), size), x.dtype).at[:, index].set(1).reshape(x.shape)
        return push(tangent).reshape(len(x), size)[:, index]

    return value, jax.lax.map(diagonal, jnp.arange(size), batch_size=min(chunk, size)).sum(axis=0)


def hutchinson_divergence(
    velocity: Callable, x: BatchArray, probes: Float[Array, "P ..."]
) -> tuple[Array, Float[Array, " B"]]:
    """Returns a velocity and the mean of e^T J e over probes e of unit covariance (Hutchinson 1990).

    Raises:
      UserError: the velocity or a probe does not have x's shape.
    """
    x, probes = as_rows("x", x), as_rows("probes", probes)
    value, push = jax.linearize(functools.partial(call_now, velocity), x)
    check_shapes("x", x, "the velocity", value)
    check_shapes("x", x, "a probe", probes[0])
    return value, jax.vmap(lambda probe: sum_rows(probe * push(probe)))(probes).mean(axis=0)


def _with_divergence(velocity: Callable, exact: bool, t, state, probes, *args):
    """Returns the time derivative of (x, log-density)."""
    x, _ = state

    def velocity_of(x):
        return velocity_at(velocity, t, x, *args)

    return (
        exact_divergence(velocity_of, x) if exact else hutchinson_divergence(velocity_of, x, jnp.moveaxis(probes, 1, 0))
    )


def check_divergence(divergence: str) -> None:
    """Raises UserError for an unknown divergence."""
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise UserError(f"divergence={divergence!r} is unknown, expected one of {', '.join(DIVERGENCES)}.")


def _check(divergence: str, noise: str, num_probes: int, key, solver: str, times) -> None:
    """Raises UserError for arguments of `log_prob` that contradict each other."""
    check_divergence(divergence)
    check_whole("num_probes", num_probes)
    if not isinstance(noise, str) or noise not in PROBES:
        raise UserError(f"noise={noise!r} is unknown, expected one of {', '.join(PROBES)}.")
    if divergence == "exact" and (key is not None or noise != "rademacher"):
        raise UserError('divergence="exact" draws no probes: leave out key and noise, or choose "hutchinson".')
    if divergence == "hutchinson" and key is None:
        raise UserError('divergence="hutchinson" draws probes: pass `key`.')
    if divergence == "exact" and num_probes > 1:
        raise UserError(f"num_probes={num_probes}: expected more than 1 only with hutchinson's divergence.")
    if times is None:
        return
    check_numbers("times", times)
    if solver in tuple(ADAPTIVE):
        raise UserError(
            f"solver={solver!r} chooses its own steps: leave out times, which have no effect on a likelihood."
        )
    times = np.ravel(times)
    if times.size and times[0] < times[-1]:
        raise UserError(
            f"times increase from {times[0]:g} to {times[-1]:g}, expected decreasing times, from the data to the "
            "noise: pass times[::-1]."
        )


def log_prob(
    velocity: Callable,
    x_1: CheckedBatch,
    divergence: str = "exact",
    key: RandomKey | RowKeys | None = None,
    solver: str = "tsit5",
    num_steps: int | None = None,
    rtol: Number = TOLERANCE,
    atol: Number = TOLERANCE,
    t0: Number = 0.0,
    t1: Number = 1.0,
    per_sample: bool = False,
    *,
    noise: str = "rademacher",
    num_probes: int = 1,
    prior: Callable | None = None,
    times=None,
    args: tuple = (),
    max_steps: int = MAX_STEPS,
) -> LogProbResult:
    """Returns the log-likelihood of data under the flow of a velocity, by the formula in the module's docstring.

    The result is differentiable in the velocity's weights and in x_1.

    Args:
      velocity: as in `sample`; rows must be independent of each other.
      x_1: data [B, ...] at t1.
      divergence: "exact" takes one Jacobian-vector product per evaluation and entry of an example; "hutchinson" takes
        one per evaluation and probe, and is unbiased.
      key: for "hutchinson" only: draws the probes, once for the whole solve, as a field whose noise changes from step
        to step has no solution. A row's probes depend only on the key and the row's number; or pass one key for each
        row.
      solver, num_steps, rtol, atol, per_sample, args, max_steps: as in `sample`; the error of a shared step includes
        points and log-densities.
      t0, t1: the times of noise and data.
      noise: distribution of the probes: "rademacher", which has the smaller variance, or "gaussian".
      num_probes: number of probes that are averaged.
      prior: x_0 -> log-density [B] at t0; standard normal if None. For a path that starts elsewhere, such as VE, pass
        `start_log_prob(path.start)`.
      times: the steps of a fixed solver, decreasing from the time of the data to that of the noise.

    Returns:
      A `LogProbResult`; its log_prob [B] is in nats.

    Raises:
      UserError: arguments contradict each other or have no effect; the velocity does not have x's shape, or the prior
        is not one number for each row.
      RuntimeError: an adaptive solver failed.
    """
    check_function("velocity", velocity)
    if prior is not None:
        check_function("prior", prior)
    _check(divergence, noise, num_probes, key, solver, times)
    settings = SolverSettings.make(solver, num_steps, rtol, atol, t1, t0, per_sample, times, max_steps, ends=(1.0, 0.0))
    x_1 = as_rows("x_1", x_1)
    check_args(args, x_1)
    if not x_1.size:
        raise UserError(
            f"x_1 has shape {list(x_1.shape)}, expected a batch that is not empty: leave out empty batches."
        )
    probes = None
    if key is not None:
        shape = (num_probes, *x_1.shape[1:])
        probes = jax.vmap(lambda key: PROBES[noise](key, shape, x_1.dtype))(row_keys(key, np.arange(len(x_1))))
    state = (x_1, jnp.zeros(len(x_1), full_dtype(x_1)))
    field = functools.partial(_with_divergence, velocity, divergence == "exact")
    r = integrate(field, state, (probes, *args), settings, trajectory=False)
    x_0, change = r.state
    # The integral from t1 down to t0 is the negative of that from t0 to t1, as log p needs it.
    start = standard_normal_log_prob(x_0) if prior is None else call_now(prior, x_0)
    check_shapes("the prior's log-density", start, "the batch of data", change)
    return LogProbResult(start + change, x_0, r.nfe)


def bits_per_dim(log_prob: Float[Array, " B"], size: int, bins: Number = 1.0) -> Float[Array, " B"]:
    """Returns -log2 p per dimension for data whose discrete values are 1 / bins apart.

    Args:
      log_prob: log-density of the continuous data, in nats.
      size: number of entries of an example.
      bins: number of discrete values per unit; 1 for a density. Bytes mapped to [-1, 1] have 128, which adds 7 bits.
    """
    check_numbers("log_prob", log_prob)
    check_whole("size", size)
    check_number("bins", bins, 0.0, above=True)
    return -jnp.asarray(log_prob, float_dtype(log_prob)) / (size * math.log(2)) + math.log2(bins)


def image_bits_per_dim(
    velocity: Callable,
    images: Num[AnyArray, "B H W C"],
    key: RandomKey | RowKeys,
    num_samples: int = 1,
    *,
    levels: int = 256,
    **options,
) -> Float[Array, " B"]:
    """Returns bits per dimension of images under a flow on [-1, 1], by uniform dequantisation (Theis et al. 2016).

    This is -log2 of the mean of p((image + u) / 128 - 1) over K draws of u in [0, 1), per dimension and in units of one
    byte. It is an upper bound in expectation that decreases with K; on CIFAR-10 by about 0.1 from K = 1 to 20 (Lipman
    et al. 2023, table 4). All K draws share the probes of Hutchinson's divergence: with different probes, their noise
    inside the mean of exponentials would make the likelihood look better than it is.

    Args:
      velocity: trained on images in [-1, 1].
      images: bytes, or integers below `levels`.
      key: for the dequantisation and for the probes of a Hutchinson divergence: one key, or one for each row.
      num_samples: K.
      levels: number of values that an entry may have; the 128 above is half of it.
      **options: passed to `log_prob`.

    Raises:
      UserError: images are not integers from 0 to levels - 1; or as `log_prob`.
    """
    check_function("velocity", velocity)
    check_whole("num_samples", num_samples)
    check_whole("levels", levels)
    check_numbers("images", images)
    images = jnp.asarray(images)
    check_whole("the number of axes of images", images.ndim)
    _check_levels(images, levels)
    size = math.prod(images.shape[1:])
    keys = row_keys(key, np.arange(len(images)))
    if options.get("divergence", "exact") == "hutchinson":
        options["key"] = stream(keys, num_samples)

    def one(k):
        noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(stream(keys, k))
        return log_prob(velocity, (images + noise) / (levels / 2) - 1, **options).log_prob

    draws = jnp.stack([one(k) for k in range(num_samples)])
    return bits_per_dim(jax.nn.logsumexp(draws, axis=0) - math.log(num_samples), size, bins=levels / 2)


def _check_levels(images: Array, levels: int) -> None:
    """Raises UserError for floats, and for values outside 0 ... levels - 1 unless they are traced."""
    integers = jnp.issubdtype(images.dtype, jnp.integer)
    concrete = integers and images.size and not is_traced(images)
    low, high = (int(images.min()), int(images.max())) if concrete else (0, 0)
    if not integers or low < 0 or high >= levels:
        values = f"from {low} to {high}" if integers else f"of {images.dtype}"
        raise UserError(
            f"images have values {values}, expected integers from 0 to {levels - 1}: pass bytes as they are."
        )
