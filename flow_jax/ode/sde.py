"""Sampling by a stochastic differential equation with the flow's marginals (Song et al. 2021; Ma et al. 2024).

dx = [v(t, x) + g(t)^2 / 2 score(t, x)] dt + g(t) dW has the marginals of dx = v dt for every g >= 0: the added drift
balances the noise. Along an affine path the velocity determines the score if noise and data are independent. For a flow
trained with coupled pairs (couplings.exact, for example) -E[x_0 | x] / sigma is not the score, and the marginals
differ.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flow_jax.argument_checks import check_function, check_key, check_number, check_whole
from flow_jax.arrays import CheckedBatch, Number, RandomKey, as_rows, check_args, velocity_at
from flow_jax.callables import run
from flow_jax.ode.sampling import SampleResult
from flow_jax.paths.conversions import Convertible
from train_jax.core.errors import UserError


def sample_sde(
    velocity: Callable,
    x_0: CheckedBatch,
    path: Any,
    key: RandomKey,
    num_steps: int = 250,
    strength: Number = 1.0,
    *,
    trajectory: bool = False,
    args: tuple = (),
) -> SampleResult:
    """Samples from the module's SDE by Euler-Maruyama's method, for flows trained on independent pairs.

    The noise has g(t)^2 = 2 strength sigma(t) (Ma et al. 2024). As this g vanishes with sigma, the added drift,
    strength sigma score = -strength E[noise | x], is bounded everywhere.

    Args:
      velocity: (t, x, *args) -> [B, ...], trained along `path`; see `sample`.
      x_0: x at t = 0: noise, or for VE `sigma(0)` times noise.
      path: an affine path.
      key: for the noise; a row's noise does not depend on the number of rows.
      num_steps: number of equal steps from t = 0 to 1, one evaluation each.
      strength: 0 or more; 0 is Euler's method for the flow itself.
      trajectory: also return x at all times.
      args: arrays [B, ...] that are passed to the velocity.

    Returns:
      A `SampleResult`; x has the shape of x_0.

    Raises:
      UserError: num_steps is below 1, the strength negative, or the path not affine; or the velocity does not have x's
        shape.
    """
    if not isinstance(path, Convertible):
        raise UserError(
            f"the path is {path}, which has no score of a velocity, expected an affine path, such as CondOT: use "
            "`sample`."
        )
    check_function("velocity", velocity)
    check_key("key", key)
    check_whole("num_steps", num_steps, None)
    check_number("strength", strength)
    if num_steps < 1 or not strength >= 0:
        raise UserError(f"num_steps={num_steps} and strength={strength:g}: expected num_steps >= 1 and strength >= 0.")
    x_0 = as_rows("x_0", x_0)
    check_args(args, x_0)
    times = jnp.linspace(0.0, 1.0, num_steps + 1, dtype=jnp.promote_types(x_0.dtype, jnp.float32))
    field = functools.partial(_drift_and_diffusion, velocity, path)
    end, states = run(_euler_maruyama, field, (trajectory,), x_0, args, times, jnp.float32(strength), key)
    return SampleResult(end, jnp.int32(num_steps), times if trajectory else None, states)


def _drift_and_diffusion(velocity: Callable, path: Convertible, strength, t, x, *args):
    """Returns the drift, and g^2 / 2."""
    v = velocity_at(velocity, t, x, *args)
    return v - strength * path.velocity_to_epsilon(v, x, t), strength * path.sigma(t)


def _euler_maruyama(field, keep: bool, arrays, x_0, args, times, strength, key):
    rows = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(x_0)))

    def step(x, inputs):
        index, t, next_t = inputs
        drift, diffusion = field(arrays, strength, t, x, *args)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(rows)
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
        dt = next_t - t
        x = x + (dt * drift + jnp.sqrt(2 * diffusion * dt) * noise).astype(x.dtype)
        return x, x if keep else None

    end, states = lax.scan(step, x_0, (jnp.arange(len(times) - 1), times[:-1], times[1:]))
    return end, None if states is None else jnp.concatenate([x_0[None], states])
