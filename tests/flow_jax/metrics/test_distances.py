"""Metrics against POT's, ott's and scipy's numbers and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

import flow_jax as fj
from flow_jax.metrics.moments import Moments, frechet
from tests.flow_jax.fields import FIELDS
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
TOLERANCE = {"float64": 1e-8, "float32": 1e-4}


def test_distances_equal_the_goldens(golden_case, precision):
    case = golden_case("flow_metrics")
    x, y, metrics = case["x"], case["y"], fj.metrics
    rel = TOLERANCE[precision]
    assert metrics.wasserstein(x, y) == pytest.approx(case["w2"], rel=rel)
    assert metrics.wasserstein(x, y) ** 2 == pytest.approx(case["w2_sq"], rel=rel)
    assert metrics.wasserstein(x, y, p=1) == pytest.approx(case["w1"], rel=rel)
    assert metrics.wasserstein(x, case["y_small"]) == pytest.approx(case["w2_small"], rel=rel)
    got = metrics.sinkhorn_divergence(x, y, epsilon=case["sd_eps"])
    assert got == pytest.approx(case["sinkhorn_divergence"], rel=1e-6 if precision == "float64" else 1e-4)
    bandwidth = case["mmd_bandwidth"]
    assert metrics.mmd(x, y, bandwidth) == pytest.approx(case["mmd2_biased"], rel=rel)
    assert metrics.mmd(x, y, bandwidth, unbiased=True) == pytest.approx(case["mmd2_unbiased"], rel=rel)
    assert metrics.energy_distance(x, y) == pytest.approx(case["energy"], rel=rel)


def test_frechet_distances_equal_the_goldens(golden_case, precision):
    case = golden_case("flow_metrics")
    a, b, n = case["feat_a"], case["feat_b"], case["n_low"]
    double = precision == "float64"
    assert fj.metrics.frechet_distance(a, b) == pytest.approx(case["frechet"], rel=1e-7 if double else 1e-4)
    low = fj.metrics.frechet_distance(a[:n], b[:n])  # fewer rows than features
    assert low == pytest.approx(case["frechet_low"], rel=1e-7 if double else 1e-2)


@pytest.mark.parametrize("name", FIELDS)
def test_straightness_and_energy_equal_the_goldens(golden_case, precision, name):
    case = golden_case("flow_ode")
    velocity, rel = FIELDS[name](case), 1e-9 if precision == "float64" else 1e-4
    assert fj.metrics.path_energy(velocity, case["x0"]) == pytest.approx(case[f"{name}_path_energy"], rel=rel)
    assert fj.metrics.straightness(velocity, case["x0"]) == pytest.approx(case[f"{name}_straightness"], rel=rel)


def test_a_straight_flow_at_constant_speed_is_perfectly_straight():
    x = jax.random.normal(jax.random.key(0), (6, 2, 3))
    shift = jnp.arange(6.0).reshape(2, 3)

    def velocity(t, x):
        return jnp.broadcast_to(shift[None], x.shape)

    assert fj.metrics.straightness(velocity, x) == pytest.approx(0.0, abs=1e-10)
    assert fj.metrics.path_energy(velocity, x) == pytest.approx(float((shift**2).sum()), rel=1e-6)
    # Around a circle: speed 2 pi all along, and nowhere to go; Euler's polygon spirals out a little.
    spin = jnp.array([[0.0, 2 * np.pi], [-2 * np.pi, 0.0]])
    x = jnp.array([[1.0, 0.0]])
    assert fj.metrics.straightness(lambda t, x: x @ spin, x, num_steps=2000) == pytest.approx(4 * np.pi**2, rel=0.05)


def test_distances_of_clouds_that_are_shifted_are_the_shift(double):
    x = np.random.default_rng(0).normal(size=(50, 3, 2))
    for p in (1, 2, 3):
        assert fj.metrics.wasserstein(x, x + 2.0, p) == pytest.approx(2 * np.sqrt(6), rel=1e-6)
        with pytest.raises(UserError, match="rows of 6 and 2 entries have no distance"):
            fj.metrics.wasserstein(x, x[:, 0, :2], p)
    flat = x.reshape(50, 6)
    assert fj.metrics.frechet_distance(flat, flat + 2.0) == pytest.approx(24.0, rel=1e-9)
    assert fj.metrics.frechet_distance(flat, 3 * flat - 2 * flat.mean(0)) == pytest.approx(
        4 * np.trace(np.cov(flat, rowvar=False)), rel=1e-9
    )
    for distance in (fj.metrics.energy_distance, fj.metrics.mmd, fj.metrics.sinkhorn_divergence):
        assert distance(x, x) == pytest.approx(0.0, abs=1e-8)
        assert distance(x, x + 1.0) > 0.1
        # Blocks: more rows than a block holds change nothing.
    many = np.tile(x, (45, 1, 1))
    assert fj.metrics.energy_distance(many, many + 1) == pytest.approx(fj.metrics.energy_distance(x, x + 1), rel=1e-9)


def test_frechet_distance_is_the_one_by_scipys_root():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(40, 5)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert fj.metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-8)
    one = a[:, :1]
    want = (one.mean() - b[:, 0].mean()) ** 2 + (one.std(ddof=1) - b[:, 0].std(ddof=1)) ** 2
    assert fj.metrics.frechet_distance(one, b[:, :1]) == pytest.approx(want, rel=1e-8)


def test_moments_of_batches_equal_those_of_the_whole():
    """Far from zero, where sums of squares would cancel; and batches of one row, or none."""
    rng = np.random.default_rng(2)
    rows, other = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) + 1e6, rng.normal(size=(40, 4)) + 1e6
    streamed = Moments()
    for part in np.split(rows, [0, 1, 2, 9, 30, 30]):
        streamed.add(part)
        if streamed.count > 1:
            assert streamed.root.shape == (4, 4)  # kept between calls, but not beyond new rows
    assert streamed.count == 50
    np.testing.assert_allclose(streamed.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(streamed.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
    want = fj.metrics.frechet_distance(rows, other)
    assert frechet(streamed, Moments.of(other)) == pytest.approx(want, rel=1e-7)
    with pytest.raises(UserError, match="rows have 3 features, those before 4"):
        streamed.add(rows[:, :3])


def test_bad_arguments():
    x = np.zeros((3, 2))
    with pytest.raises(UserError, match="p is 0.5"):
        fj.metrics.wasserstein(x, x, 0.5)
    with pytest.raises(UserError, match="is 1, expected at least 2 for a covariance"):
        fj.metrics.frechet_distance(x[:1], x)


def test_coverage_of_a_small_example():
    """Real points 0, 1, 2, 10: with one neighbour radii are 1, 1, 1 and 8. Samples reach the first and the last."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    assert fj.metrics.coverage(np.array([[-1.0], [18.0]]), real, neighbours=1) == 0.5
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2000, 2))
    assert fj.metrics.coverage(one, other) == pytest.approx(1 - 2**-5, abs=0.01)
    assert fj.metrics.coverage(one * 0.1, other) < 0.2
