"""Each distribution has the support, mean and symmetry of its description."""

import numpy as np
import pytest

from flow_jax.data import toys
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
