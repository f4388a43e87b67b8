"""Exact transport on the host: the reduction does not change the optimum; plans have the given weights."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from flow_jax.couplings import assignment
from train_jax.core.errors import UserError


def clouds(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "clusters":
        angle = rng.integers(0, 8, n) * np.pi / 4
        return rng.normal(size=(n, 2)), 5 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(n, 2))
    if kind == "lattice":  # many ties
        return rng.integers(0, 4, (n, 2)).astype(float), rng.integers(0, 4, (n, 2)).astype(float)
    if kind == "far outlier":
        x, y = rng.normal(size=(2, n, 2))
        y[0] = 1e4
        return x, y
    return rng.normal(size=(n, 48)), 3 + rng.normal(size=(n, 48))


@pytest.mark.parametrize("kind", ["clusters", "lattice", "far outlier", "shifted"])
@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_assignments_are_permutations_of_least_cost(kind, n, dtype):
    x, y = clouds(kind, n)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1).astype(dtype)
    assert n < 300 or n >= assignment.REDUCE_FROM
    got, want = assignment.assign(cost), linear_sum_assignment(cost)[1]
    np.testing.assert_array_equal(np.sort(got), np.arange(n))
    best = cost[np.arange(n), want].sum(dtype=np.float64)
    np.testing.assert_allclose(cost[np.arange(n), got].sum(dtype=np.float64), best, rtol=1e-6)


def test_the_reduced_cost_is_the_cost_less_potentials_and_never_negative():
    x, y = clouds("clusters", 64)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    reduced = assignment.reduce_cost(cost)
    moved = cost - reduced
    np.testing.assert_allclose(moved - moved[:1] - moved[:, :1] + moved[0, 0], 0, atol=1e-10)
    assert reduced.min() >= 0
    assert (reduced.min(axis=0) == 0).all()
    # Near what an optimum uses: far below the cost's own spread.
    rows, columns = linear_sum_assignment(cost)
    assert reduced[rows, columns].mean() < 0.05 * cost.std()


def test_a_constant_cost_and_one_that_is_not_finite():
    np.testing.assert_array_equal(np.sort(assignment.assign(np.ones((300, 300)))), np.arange(300))
    cost = np.ones((3, 3))
    cost[1, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        assignment.assign(cost)
    with pytest.raises(UserError, match=r"shape \(2, 3\)"):
        assignment.assign(np.ones((2, 3)))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (6, 4), (4, 9)])
def test_plans_have_their_marginals_and_satisfy_complementary_slackness(n, m):
    """Optimal: no cycle of two pairs that carry mass can be crossed at a lower cost."""
    rng = np.random.default_rng(0)
    cost = rng.random((n, m))
    a, b = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    plan = assignment.transport(cost, a, b)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-12)
    used = np.argwhere(plan > 1e-9)
    for i, j in used:
        for k, l in used:  # noqa: E741
            assert cost[i, j] + cost[k, l] <= cost[i, l] + cost[k, j] + 1e-9
    with pytest.raises(UserError, match="weights sum to"):
        assignment.transport(cost, a, 2 * b)
