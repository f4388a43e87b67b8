"""Likelihoods against closed forms and torchdiffeq's; divergences; dequantisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from flow_jax.ode.likelihood import exact_divergence, hutchinson_divergence
from tests.flow_jax.fields import FIELDS
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.mark.parametrize("name", FIELDS)
def test_fields_and_divergences_equal_the_goldens(golden_case, precision, name):
    case = golden_case("flow_ode")
    velocity, t = FIELDS[name](case), case["t_eval"]
    u, divergence = exact_divergence(lambda x: velocity(t, x), case["x0"])
    tolerance = dict(rtol=1e-9, atol=1e-9) if precision == "float64" else dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(u, case[f"{name}_u"], **tolerance)
    np.testing.assert_allclose(divergence, case[f"{name}_div"], **tolerance)


@pytest.mark.parametrize("name", FIELDS)
def test_fixed_step_likelihoods_equal_torchdiffeqs(golden_case, precision, name):
    case = golden_case("flow_ode")
    for solver in ("euler", "midpoint"):
        r = fj.log_prob(FIELDS[name](case), case["x1"], solver=solver, num_steps=20)
        atol = 1e-9 if precision == "float64" else 2e-4
        np.testing.assert_allclose(r.log_prob, case[f"{name}_logp_{solver}_20"], rtol=1e-9, atol=atol)


@pytest.mark.parametrize(("solver", "per_sample"), [("dopri5", False), ("tsit5", True)])
def test_the_likelihood_of_a_mixture_is_its_density(golden_case, precision, solver, per_sample):
    case = golden_case("flow_ode")
    tolerance, allowed, inverse = (1e-7, 5e-5, 1e-6) if precision == "float64" else (1e-5, 1e-2, 1e-3)
    options = dict(solver=solver, rtol=tolerance, atol=tolerance, per_sample=per_sample)
    r = fj.log_prob(FIELDS["gmm"](case), case["x1"], **options)
    np.testing.assert_allclose(r.log_prob, case["gmm_logp_exact"], rtol=0, atol=allowed)
    np.testing.assert_allclose(r.x_0, case["gmm_inverse_exact"], rtol=0, atol=inverse)
    bits = fj.bits_per_dim(r.log_prob, size=2)
    np.testing.assert_allclose(bits, case["gmm_bpd_exact"], rtol=0, atol=allowed)
    if not per_sample:
        r = fj.log_prob(FIELDS["mlp"](case), case["x1"], **options)
        np.testing.assert_allclose(r.log_prob, case["mlp_logp_dopri5"], rtol=0, atol=allowed)


def gaussian_flow(std, shift):
    """The marginal field along CondOT of data N(shift, std^2), elementwise: the exact flow of a Gaussian."""

    def velocity(t, x):
        variance = t**2 * std**2 + (1 - t) ** 2
        return shift + (t * std**2 - (1 - t)) / variance * (x - t * shift)

    return velocity


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2)])
def test_the_likelihood_of_a_gaussian_flow_is_exact_for_any_shape(double, shape):
    """Images too: indexing flattened dimensions of an unflattened velocity is a known mistake."""
    x = jax.random.normal(jax.random.key(0), (4, *shape))
    size = math.prod(shape)
    std, shift = 0.3, 1.5
    want = -0.5 * jnp.sum((x - shift) ** 2, axis=range(1, x.ndim)) / std**2 - size * math.log(
        std * math.sqrt(2 * np.pi)
    )
    options = dict(rtol=1e-8, atol=1e-8)
    exact = fj.log_prob(gaussian_flow(std, shift), x, **options)
    np.testing.assert_allclose(exact.log_prob, want, rtol=1e-5)
    np.testing.assert_allclose(exact.x_0, (x - shift) / std, rtol=1e-5)
    # The Jacobian is a multiple of the identity, of which Rademacher probes have the exact trace.
    drawn = fj.log_prob(gaussian_flow(std, shift), x, divergence="hutchinson", key=jax.random.key(1), **options)
    np.testing.assert_allclose(drawn.log_prob, want, rtol=1e-5)


def test_exact_divergence_is_the_trace_whatever_the_chunk(double):
    matrix = jax.random.normal(jax.random.key(0), (12, 12))

    def velocity(x):
        return jnp.tanh(x.reshape(len(x), 12) @ matrix).reshape(x.shape)

    x = jax.random.normal(jax.random.key(1), (3, 2, 3, 2))
    want = jax.vmap(lambda row: jnp.trace(jax.jacobian(lambda y: velocity(y[None])[0])(row).reshape(12, 12)))(x)
    for chunk in (1, 5, 64):
        np.testing.assert_allclose(exact_divergence(velocity, x, chunk)[1], want, rtol=1e-10)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased_and_fixed_within_a_solve(double, noise):
    matrix = jax.random.normal(jax.random.key(0), (3, 3))

    def velocity(t, x):
        return jnp.sin(x @ matrix)

    x = jnp.tile(jnp.array([[0.3, -0.5, 1.0]]), (4000, 1))
    options = dict(solver="rk4", num_steps=20)
    exact = fj.log_prob(velocity, x[:1], **options).log_prob[0]
    drawn = fj.log_prob(velocity, x, "hutchinson", jax.random.key(1), noise=noise, **options).log_prob
    error = float(drawn.std()) / math.sqrt(len(x))
    assert float(drawn.std()) > 0.1
    assert float(drawn.mean()) == pytest.approx(float(exact), abs=4 * error)
    averaged = fj.log_prob(velocity, x, "hutchinson", jax.random.key(1), noise=noise, num_probes=16, **options).log_prob
    assert float(averaged.std()) == pytest.approx(float(drawn.std()) / 4, rel=0.15)
    # One probe for the whole solve: the estimate converges with the steps at the solver's order.
    coarse, fine, finest = (
        fj.log_prob(velocity, x[:5], "hutchinson", jax.random.key(1), noise=noise, solver="rk4", num_steps=n).log_prob
        for n in (10, 20, 160)
    )
    ratio = jnp.abs(coarse - finest).max() / jnp.abs(fine - finest).max()
    assert 10 < float(ratio) < 25


def test_hutchinson_divergence_of_probes_that_form_a_basis_is_exact(double):
    matrix = jax.random.normal(jax.random.key(0), (4, 4))
    probes = 2 * jnp.broadcast_to(jnp.eye(4)[:, None], (4, 3, 4))  # mean outer product: the identity
    _, got = hutchinson_divergence(lambda x: x @ matrix, jnp.ones((3, 4)), probes)
    np.testing.assert_allclose(got, jnp.trace(matrix), rtol=1e-12)


def test_gradients_flow_through_a_likelihood(double):
    """A known mistake of a peer is to detach them."""
    x = jax.random.normal(jax.random.key(0), (5, 2))

    def loss(log_std, **options):
        velocity = jax.tree_util.Partial(lambda log_std, t, x: log_std * x, log_std)
        return fj.log_prob(velocity, x, **options).log_prob.sum()

    # Under dx/dt = a x, x_1 = e^a x_0: log p = log N(e^-a x) - 2 a.
    log_std = jnp.array(0.3)
    want = jax.grad(lambda a: (-0.5 * jnp.exp(-2 * a) * (x**2).sum(1) - 2 * a).sum())(log_std)
    for options in (dict(rtol=1e-9, atol=1e-9), dict(solver="rk4", num_steps=30)):
        assert float(jax.grad(loss)(log_std, **options)) == pytest.approx(float(want), rel=1e-5)


def test_a_user_defined_prior(double):
    x = jnp.ones((2, 1))
    r = fj.log_prob(lambda t, x: jnp.zeros_like(x), x, prior=lambda x: -7.0 * x[:, 0])
    np.testing.assert_allclose(r.log_prob, -7.0)


@pytest.mark.parametrize("levels", [256, 17])
def test_bits_of_bytes_under_a_uniform_density(levels):
    """Under a density that is constant over [-1, 1] a byte costs 8 bits, whatever its value and however many draws."""
    images = (jnp.arange(2 * 4 * 4 * 3) % levels).astype(jnp.uint8).reshape(2, 4, 4, 3)

    def uniform(x):
        inside = (jnp.abs(x) <= 1).all(axis=(1, 2, 3))
        return jnp.where(inside, -48 * jnp.log(2.0), -jnp.inf)

    for samples in (1, 3):
        bits = fj.image_bits_per_dim(
            lambda t, x: jnp.zeros_like(x),
            images,
            jax.random.key(0),
            samples,
            prior=uniform,
            solver="euler",
            num_steps=1,
            levels=levels,
        )
        np.testing.assert_allclose(bits, math.log2(levels), rtol=1e-5)


def test_more_draws_tighten_the_bound():
    """Under a density about as wide as one byte's cell, log p varies from draw to draw."""
    images = jnp.full((64, 2, 2, 1), 128, jnp.uint8)

    def prior(x):
        return jax.scipy.stats.norm.logpdf(x, 0.004, 0.002).sum(axis=(1, 2, 3))

    options = dict(prior=prior, solver="euler", num_steps=1)
    one, many = (
        float(fj.image_bits_per_dim(lambda t, x: jnp.zeros_like(x), images, jax.random.key(0), k, **options).mean())
        for k in (1, 20)
    )
    mass = jnp.diff(jax.scipy.stats.norm.cdf(jnp.array([0.0, 1 / 128]), 0.004, 0.002))[0]
    exact = float(-jnp.log2(mass))  # the bits of the byte itself
    assert exact < many < one - 0.05


def test_a_decreasing_grid_equals_its_number_of_steps(double):
    x = jnp.array([[1.5, 1.2], [-0.3, 0.8]])

    def velocity(t, x):
        return 0.7 * x

    grid = fj.times.uniform_grid(32)[::-1]
    got = fj.log_prob(velocity, x, solver="rk4", times=grid).log_prob
    np.testing.assert_allclose(got, fj.log_prob(velocity, x, solver="rk4", num_steps=32).log_prob, rtol=1e-12)


def test_more_draws_with_hutchinsons_divergence_do_not_overestimate_the_likelihood():
    """Of a field whose Jacobian is far from diagonal, so that the estimate is noisy."""
    matrix = 0.3 * jax.random.normal(jax.random.key(1), (16, 16))
    images = jax.random.randint(jax.random.key(2), (100, 4, 4, 1), 0, 256)

    def velocity(t, x):
        return (x.reshape(-1, 16) @ matrix).reshape(x.shape)

    def bits(**options):
        return float(
            fj.image_bits_per_dim(
                velocity, images, jax.random.key(0), 10, solver="rk4", num_steps=4, **options
            ).mean()
        )  # fmt: skip

    assert bits(divergence="hutchinson") == pytest.approx(bits(), abs=0.1)


def test_a_rows_draws_do_not_depend_on_the_batch():
    """One key for all rows, or one a row, with which a data set may be measured in batches of any size."""
    matrix = 0.3 * jax.random.normal(jax.random.key(1), (16, 16))
    images = jax.random.randint(jax.random.key(2), (6, 4, 4, 1), 0, 256)

    def bits(rows, key):
        options = dict(divergence="hutchinson", solver="rk4", num_steps=2)
        return fj.image_bits_per_dim(
            lambda t, x: (x.reshape(-1, 16) @ matrix).reshape(x.shape), images[rows], key, 2, **options
        )

    whole = bits(np.arange(6), jax.random.key(0))
    np.testing.assert_allclose(bits(np.arange(4), jax.random.key(0)), whole[:4], rtol=1e-6)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(6))
    np.testing.assert_allclose(bits(np.arange(6), keys), whole, rtol=1e-6)
    np.testing.assert_allclose(bits(np.array([5, 2]), keys[np.array([5, 2])]), whole[np.array([5, 2])], rtol=1e-6)
    assert float(bits(np.array([0, 0]), keys[:2])[0]) != float(bits(np.array([0, 0]), keys[:2])[1])


@pytest.mark.parametrize(
    ("images", "values"),
    [(np.zeros((2, 4, 4, 1), np.float32), "of float32"), (np.full((2, 4, 4, 1), 16), "from 16 to 16")],
)
def test_images_with_values_outside_the_levels_are_refused(images, values):
    with pytest.raises(UserError, match=f"images have values {values}, expected integers from 0 to 15"):
        fj.image_bits_per_dim(lambda t, x: x, images, jax.random.key(0), levels=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(divergence="hutchinson"), "pass `key`"),
        (dict(divergence="brute"), "divergence='brute' is unknown"),
        (dict(divergence="hutchinson", key=jax.random.key(0), noise="white"), "noise='white' is unknown"),
        (dict(key=jax.random.key(0)), "draws no probes: leave out key and noise"),
        (dict(noise="gaussian"), "draws no probes"),
        (
            dict(solver="rk4", times=[0.0, 0.5, 1.0]),
            r"times increase from 0 to 1, expected decreasing times, .* times\[::-1\]",
        ),
        (dict(solver="rk4", num_steps=4, max_steps=7), "max_steps=7 has no effect"),
        (dict(num_probes=2), "num_probes=2"),
        (dict(num_steps=3), "leave out num_steps=3"),
        (dict(times=[1.0, 0.0]), "leave out times"),
        (dict(solver="euler"), "got neither"),
    ],
)
def test_contradictory_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        fj.log_prob(lambda t, x: x, jnp.ones((2, 2)), **options)
