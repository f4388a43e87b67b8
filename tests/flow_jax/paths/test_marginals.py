"""Marginal fields in closed form: the golden of Theorem 1, the continuity equation, scores, Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj

pytestmark = pytest.mark.usefixtures("fast_compilation")
TOLERANCE = {"float64": dict(rtol=1e-9, atol=1e-9), "float32": dict(rtol=1e-4, atol=1e-3)}


def paths(case):
    return {
        "ot": fj.paths.CondOT(case["sigma_min"]),
        "vp": fj.paths.VP(*map(float, case["betas"])),
        "ve": fj.paths.VE(*map(float, case["sigmas_ve"])),
    }


@pytest.mark.parametrize("name", ["ot", "vp", "ve"])
def test_theorem_1_equals_the_golden(golden_case, precision, name):
    case = golden_case("flow_theory")
    path, t, x = paths(case)[name], case[f"{name}_t"], case[f"{name}_x"]
    tolerance = TOLERANCE[precision]
    coefficients = [path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)]
    np.testing.assert_allclose(coefficients, case[f"{name}_coef"], **tolerance)
    marginal = fj.marginals.MixtureMarginal(path, case["data"])
    got = {
        "log_p": marginal.log_prob(x, t),
        "u": marginal.velocity(t, x),
        "score": marginal.score(x, t),
        "denoiser": marginal.denoiser(x, t),
        "resp": marginal.posterior(x, t),
    }
    for key, value in got.items():
        np.testing.assert_allclose(value, case[f"{name}_{key}"], **tolerance, err_msg=key)


@pytest.mark.parametrize("path", [fj.paths.CondOT(0.1), fj.paths.VP(), fj.paths.VE(0.1, 5.0), fj.paths.Cosine()])
def test_the_continuity_equation_holds(double, path):
    """d log p / dt + div u + u . grad log p = 0, all by automatic differentiation."""
    marginal = fj.marginals.MixtureMarginal(path, jnp.array([[0.3, -1.0], [1.0, 0.5], [-2.0, 0.1]]), 0.3)
    x = jax.random.normal(jax.random.key(0), (40, 2))
    t = jnp.linspace(0.05, 0.95, 40)

    def residual(x, t):
        def log_p(x, t):
            return marginal.log_prob(x[None], t)[0]

        def u(x):
            return marginal.velocity(t, x[None])[0]

        gradient, slope = jax.grad(log_p, (0, 1))(x, t)
        return slope + jnp.trace(jax.jacfwd(u)(x)) + u(x) @ gradient

    np.testing.assert_allclose(jax.vmap(residual)(x, t), 0, atol=1e-9)


def test_the_marginal_score_and_denoiser_follow_from_the_velocity(double):
    """Conversions hold for marginal quantities, by linearity of the expectation."""
    for path in (fj.paths.CondOT(), fj.paths.VP(), fj.paths.Polynomial(2.0)):
        marginal = fj.marginals.MixtureMarginal(path, jnp.array([[0.3, -1.0], [1.0, 0.5]]), jnp.array([0.3, 0.8]))
        x, t = jax.random.normal(jax.random.key(0), (20, 2)), jnp.linspace(0.05, 0.95, 20)
        v = marginal.velocity(t, x)
        np.testing.assert_allclose(path.velocity_to_score(v, x, t), marginal.score(x, t), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(path.velocity_to_x1(v, x, t), marginal.denoiser(x, t), rtol=1e-8, atol=1e-8)
        gradient = jax.grad(lambda x: marginal.log_prob(x, t).sum())(x)  # noqa: B023
        np.testing.assert_allclose(marginal.score(x, t), gradient, rtol=1e-8, atol=1e-8)


def test_the_marginal_velocity_is_the_mean_target_at_a_point(double):
    """Theorem 1 by Monte Carlo: targets averaged with a narrow kernel around a point."""
    path, key = fj.paths.CondOT(0.1), jax.random.key(0)
    means, t, at = jnp.array([[-1.0], [1.0]]), 0.6, jnp.array([[0.2]])
    x_1 = jnp.tile(means, (200_000, 1))
    s = path.sample(jax.random.normal(key, x_1.shape), x_1, t)
    near = jnp.exp(-0.5 * ((s.x_t - at) / 0.02) ** 2)
    want = (near * s.dx_t).sum() / near.sum()
    got = fj.marginals.MixtureMarginal(path, means).velocity(t, at)[0, 0]
    assert float(got) == pytest.approx(float(want), rel=0.02)
