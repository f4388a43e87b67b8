"""Theorem 2 against the golden and by Monte Carlo; labels dropped by rows; coupled pairs; times and grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


def linear(theta):
    """v(t, x) = A_0 x + b_0 + t (A_1 x + b_1), theta = (A_0, b_0, A_1, b_1)."""
    return lambda t, x: theta[0] * x + theta[1] + t[:, None] * (theta[2] * x + theta[3])


def test_theorem_2_both_losses_have_the_goldens_gradients(golden, double):
    """By quadrature, as exact as the golden: Gauss-Legendre in t, all data, Gauss-Hermite in the noise."""
    with np.load(golden / "flow_theory/case.npz") as stored:
        case = {key: jnp.asarray(stored[key]) for key in stored.files if key.startswith(("thm2", "sigma"))}
    path, data = fj.paths.CondOT(float(case["sigma_min"])), case["thm2_data"]
    t, t_weights = np.polynomial.legendre.leggauss(24)
    t, t_weights = (t + 1) / 2 * float(case["thm2_tmax"]), t_weights / 2
    z, z_weights = np.polynomial.hermite_e.hermegauss(24)
    z_weights = z_weights / z_weights.sum()
    grid = np.meshgrid(np.arange(len(t)), np.arange(len(data)), np.arange(len(z)), indexing="ij")
    it, ik, iz = (index.ravel() for index in grid)
    weights = jnp.asarray(t_weights[it] * z_weights[iz] / len(data))
    sample = path.sample(jnp.asarray(z[iz])[:, None], data[ik], jnp.asarray(t[it]))
    for index, theta in enumerate(case["thm2_theta"]):
        value, gradient = jax.value_and_grad(
            lambda theta: (weights * fj.losses.conditional_flow_matching(linear(theta), sample)).sum()
        )(theta)
        np.testing.assert_allclose(value, case["thm2_loss_cfm"][index], rtol=1e-9)
        np.testing.assert_allclose(gradient, case["thm2_grad"][index], rtol=1e-7, atol=1e-9)

    # The other side: a uniform grid in x against the density of the marginal.
    marginal = fj.marginals.MixtureMarginal(path, data)
    x = np.linspace(-7, 7, 1401)
    it, ix = (index.ravel() for index in np.meshgrid(np.arange(len(t)), np.arange(len(x)), indexing="ij"))
    points, times = jnp.asarray(x[ix])[:, None], jnp.asarray(t[it])
    density = jnp.exp(marginal.log_prob(points, times)) * (x[1] - x[0]) * t_weights[it]
    for index, theta in enumerate(case["thm2_theta"]):
        value, gradient = jax.value_and_grad(
            lambda theta: (density * fj.losses.flow_matching(linear(theta), marginal.velocity, times, points)).sum()
        )(theta)
        np.testing.assert_allclose(value, case["thm2_loss_fm"][index], rtol=1e-8)
        np.testing.assert_allclose(gradient, case["thm2_grad_fm"][index], rtol=1e-7, atol=1e-8)


def test_losses_are_means_over_the_entries_of_a_row():
    path, x_1 = fj.paths.CondOT(), jnp.full((3, 4, 2), 2.0)
    sample = path.sample(jnp.zeros_like(x_1), x_1, 0.5)
    loss = fj.losses.conditional_flow_matching(lambda t, x: jnp.zeros_like(x), sample)
    np.testing.assert_allclose(loss, [4.0, 4.0, 4.0])


def test_the_best_constant_velocity_under_coupled_pairs(double):
    """With coupled pairs of two shifted clouds every target is the shift: a constant field has no loss."""
    x_0 = jax.random.normal(jax.random.key(0), (32, 2))
    order = jax.random.permutation(jax.random.key(1), 32)
    x_1, labels = (x_0 + 3.0)[order], order
    seen = []

    def velocity(t, x, labels):
        seen.append(labels)
        return jnp.full_like(x, 3.0)

    t = jnp.linspace(0.0, 1.0, 32)
    exact = fj.losses.coupled_flow_matching(velocity, fj.paths.CondOT(), x_0, x_1, t, fj.couplings.exact, labels)
    np.testing.assert_allclose(exact, 0.0, atol=1e-20)
    np.testing.assert_array_equal(seen[0], jnp.arange(32))  # labels stay with their data
    apart = fj.losses.coupled_flow_matching(
        velocity, fj.paths.CondOT(), x_0, x_1, t, lambda a, b: fj.couplings.independent(32, jax.random.key(2)), labels
    )
    assert float(apart.mean()) > 0.5

    @jax.jit
    def on_device(key):
        def coupling(a, b):
            return fj.couplings.sinkhorn(a, b, 0.01, key)

        path = fj.paths.CFM(0.1)
        return fj.losses.coupled_flow_matching(velocity, path, x_0, x_1, t, coupling, labels, key=key).mean()

    assert float(on_device(jax.random.key(3))) < 0.2 * float(apart.mean())


def test_labels_are_dropped_row_by_row():
    """The trap: one draw for a whole batch has the same mean and another law."""
    labels, null = jnp.arange(10_000) % 7, 7
    keys = jax.random.split(jax.random.key(0), 10_000)
    for key in (jax.random.key(0), keys):
        dropped = fj.losses.drop_labels(labels, 0.2, null, key) == null
        assert float(dropped.mean()) == pytest.approx(0.2, abs=0.015)
        assert float((dropped[1:] != dropped[:-1]).mean()) == pytest.approx(0.32, abs=0.02)
    kept = fj.losses.drop_labels(labels, 0.0, null, keys)
    np.testing.assert_array_equal(kept, labels)
    # A row's draw is a function of its own key.
    part = fj.losses.drop_labels(labels[5:9], 0.5, null, keys[5:9])
    np.testing.assert_array_equal(part, fj.losses.drop_labels(labels, 0.5, null, keys)[5:9])


TIMES = [
    fj.times.Uniform(),
    fj.times.Uniform(0.0, 0.9),
    fj.times.Stratified(),
    fj.times.LogitNormal(0.5, 0.8),
    fj.times.edm_skewed(),
]


@pytest.mark.parametrize("times", TIMES, ids=repr)
def test_times_follow_their_density(times):
    t = np.asarray(times.draw(jax.random.key(0), 20_000))
    assert t.min() >= 0 and t.max() <= 1
    middles = (np.arange(4000) + 0.5) / 4000
    density = np.exp(times.log_density(middles))
    assert density.mean() == pytest.approx(1.0, abs=2e-3)
    shares = density.reshape(20, -1).mean(axis=1) / 20
    np.testing.assert_allclose(np.histogram(t, 20, (0, 1))[0] / len(t), shares, atol=0.01)


def test_importance_weights_restore_the_uniform_objective():
    times = fj.times.LogitNormal(0.0, 1.5)
    t = times.draw(jax.random.key(0), 100_000)
    assert float((times.importance_weights(t) * t**2).mean()) == pytest.approx(1 / 3, abs=0.02)


def test_stratified_times_fill_every_part_in_random_order():
    t = np.asarray(fj.times.Stratified(0.2, 1.0).draw(jax.random.key(0), 64))
    np.testing.assert_array_equal(np.sort(np.floor((t - 0.2) / 0.8 * 64).astype(int)), np.arange(64))
    assert (np.diff(t) < 0).any()
    means = [
        np.mean(d.draw(jax.random.key(k), 64)) for k in range(20) for d in (fj.times.Uniform(), fj.times.Stratified())
    ]
    assert np.std(means[1::2]) < 0.1 * np.std(means[::2])


@pytest.mark.parametrize("times", TIMES, ids=repr)
def test_times_of_rows_follow_the_density_and_do_not_depend_on_other_rows(times):
    keys, rows = jax.random.split(jax.random.key(0), 20_000), np.arange(20_000)
    t = np.asarray(times.draw_rows(keys, rows, len(rows)))
    middles = (np.arange(4000) + 0.5) / 4000
    shares = np.exp(times.log_density(middles)).reshape(20, -1).mean(axis=1) / 20
    np.testing.assert_allclose(np.histogram(t, 20, (0, 1))[0] / len(t), shares, atol=0.01)
    part = rows[7:1000:3]
    np.testing.assert_array_equal(times.draw_rows(keys[part], part, len(rows)), t[part])
    np.testing.assert_array_equal(times.draw_rows(keys), t)


def test_stratified_times_of_rows_fill_every_part_over_all_micro_batches():
    keys, times = jax.random.split(jax.random.key(0), 64), fj.times.Stratified(0.2, 1.0)
    parts = [times.draw_rows(keys[rows], rows, 64) for rows in np.arange(64).reshape(4, 16)]
    np.testing.assert_array_equal(np.floor((np.concatenate(parts) - 0.2) / 0.8 * 64).astype(int), np.arange(64))


def test_grids():
    np.testing.assert_allclose(fj.times.uniform_grid(4), [0, 0.25, 0.5, 0.75, 1])
    grid = fj.times.edm_grid(18, from_noise=False)
    assert grid[0] == pytest.approx(1 / 81) and grid[-1] == 1.0 and len(grid) == 19
    sigmas = 1 / grid[:-1] - 1
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7)), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17, rtol=1e-6)
    assert fj.times.edm_grid(18)[0] == 0.0
    r = fj.sample(lambda t, x: jnp.ones_like(x), jnp.zeros((1, 1)), solver="heun", times=fj.times.edm_grid(18))
    np.testing.assert_allclose(r.x, 1.0, rtol=1e-6)
    with pytest.raises(UserError, match="at least 2"):
        fj.times.edm_grid(1)
    with pytest.raises(UserError, match="0 <= low < high <= 1"):
        fj.times.Uniform(0.5, 0.5)
