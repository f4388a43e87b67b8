"""Each distribution has the support, mean and symmetry of its description."""

import numpy as np
import pytest

from flow_jax.data import toys
from flow_jax.data.plane_pairs import ToyPairs
from train_jax.core.errors import UserError

N = 20_000


@pytest.mark.parametrize("name", toys.TOYS)
def test_a_seed_decides_the_draw(name):
    first = toys.draw(name, 100, (1, 2))
    assert first.shape == (100, 2) and first.dtype == np.float32
    np.testing.assert_array_equal(first, toys.draw(name, 100, (1, 2)))
    assert not np.array_equal(first, toys.draw(name, 100, (1, 3)))


def test_checkerboard_fills_every_second_square_evenly():
    cells = np.floor(toys.draw("checkerboard", N, 0) / 2.0).astype(int)
    assert ((cells >= -2) & (cells <= 1)).all()
    numbers, counts = np.unique(cells, axis=0, return_counts=True)
    assert len(numbers) == 8 and len({int(number.sum() % 2) for number in numbers}) == 1
    np.testing.assert_allclose(counts / N, 1 / 8, atol=0.01)


def test_gaussians_lie_on_a_circle():
    points = toys.draw("8gaussians", N, 0)
    angle = np.round(np.arctan2(points[:, 1], points[:, 0]) / (np.pi / 4)) % 8
    for k in range(8):
        of = points[angle == k]
        centre = 5 * np.array([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)])
        np.testing.assert_allclose(of.mean(0), centre, atol=0.03)
        np.testing.assert_allclose(of.var(0), 0.1, atol=0.01)


def test_moons_are_two_half_circles():
    points = (toys.draw("moons", N, 0) + 1) / 3
    upper, lower = np.hypot(*points.T), np.hypot(points[:, 0] - 1, points[:, 1] - 0.5)
    assert np.abs(np.minimum(np.abs(upper - 1), np.abs(lower - 1))).mean() < 0.2
    np.testing.assert_allclose(points.mean(0), [0.5, 0.25], atol=0.02)


def test_spirals_are_two_arms_turned_by_half():
    points = toys.draw("spirals", N, 0)
    assert np.hypot(*points.T).max() < 4.6
    np.testing.assert_allclose(points.mean(0), 0.0, atol=0.06)
    angle = np.arctan2(points[:, 1], points[:, 0])
    turn = 3 * np.pi * np.hypot(*points.T) / 4  # the arms are where turn = angle, up to half turns
    away = np.abs((turn - angle + np.pi / 2) % np.pi - np.pi / 2)
    assert np.median(away) < 0.25  # of a noise of 0.1 in the radius; 0.79 where angles are any


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="'swissroll', expected one of checkerboard, 8gaussians"):
        toys.draw("swissroll", 3, 0)


def ring(rng, n):
    """Points of a user's own distribution."""
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def column(rng, n):
    """Too few numbers."""
    return np.zeros((n, 1))


def nothing(rng, n):
    """Points that are no numbers."""
    return np.full((n, 2), np.nan)


HERE = "tests.flow_jax.data.test_toys"


def test_points_of_an_own_function():
    points = toys.draw(f"{HERE}:ring", 50, (1, 2))
    assert points.shape == (50, 2) and points.dtype == np.float32
    np.testing.assert_allclose(np.hypot(*points.T), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(points, toys.draw(f"{HERE}:ring", 50, (1, 2)))
    pairs = [ToyPairs(f"{HERE}:ring", "gaussian", 50, "exact", seed) for seed in (0, 0, 1)]
    assert pairs[0].fingerprint == pairs[1].fingerprint != pairs[2].fingerprint


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (f"{HERE}:column", r"returned an array float64 \[3, 1\], expected finite real numbers \[3, 2\]: correct"),
        (f"{HERE}:nothing", r"expected finite real numbers \[3, 2\]"),
        (f"{HERE}:N", "is int, expected a function"),
        (f"{HERE}:sphere", "has no 'sphere'"),
        (f"{HERE}:test_moons_are_two_half_circles", r"takes \(\), expected \(rng, n\)"),
    ],
)
def test_a_function_that_draws_no_points_is_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        toys.draw(name, 3, 0)
