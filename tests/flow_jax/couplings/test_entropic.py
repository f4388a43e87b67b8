"""The entropic solver against POT's and ott's plans, against the exact plan, and its own report of sharpness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from flow_jax.couplings import entropic
from flow_jax.couplings.assignment import assign

pytestmark = pytest.mark.usefixtures("fast_compilation")
CONVERGED = {"float64": 1e-10, "float32": 1e-6}
PLAN = {"float64": 1e-7, "float32": 1e-4}  # of the largest entry
COST = {"float64": 1e-6, "float32": 1e-4}


def check(solution, cost, case, name, precision):
    want = np.asarray(case[f"{name}_plan"])
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.plan(cost), want, rtol=0, atol=PLAN[precision] * want.max())
    for got, stored in (
        (solution.transport_cost(cost), "cost"),
        (solution.objective(cost), "objective"),
        (solution.regularized_cost(cost), "ott_reg_cost"),
    ):
        np.testing.assert_allclose(got, case[f"{name}_{stored}"], rtol=COST[precision], err_msg=stored)
    np.testing.assert_allclose(solution.f - solution.f.mean(), case[f"{name}_f"], atol=1e-4)


def test_plans_equal_pots_and_otts(golden_case, precision):
    case = golden_case("flow_coupling")
    for index, epsilon in enumerate(case["regs"]):
        solution = entropic.solve(case["cost"], epsilon, tolerance=CONVERGED[precision])
        check(solution, case["cost"], case, f"ent{index}", precision)


def test_a_rectangular_plan_of_given_weights(golden_case, precision):
    case = golden_case("flow_coupling")
    cost = case["cost"][:, : len(case["rect_b"])]
    options = dict(a=case["rect_a"], b=case["rect_b"], tolerance=CONVERGED[precision])
    check(entropic.solve(cost, case["regs"][1], **options), cost, case, "ent1rect", precision)


def test_squared_distances_equal_the_goldens(golden_case, precision):
    case = golden_case("flow_coupling")
    got = entropic.squared_distances(case["x0"], case["x1"])
    np.testing.assert_allclose(got, case["cost"], rtol=1e-5, atol=1e-5 if precision == "float32" else 1e-12)
    far = entropic.squared_distances(case["x0"] + 1000, case["x1"] + 1000)
    np.testing.assert_allclose(far, case["cost"], rtol=1e-2 if precision == "float32" else 1e-9, atol=1e-3)


def test_as_epsilon_shrinks_the_plan_becomes_the_exact_one(double):
    x, y = np.random.default_rng(0).normal(size=(2, 12, 2))
    cost = jnp.asarray(((x[:, None] - y[None]) ** 2).sum(-1))
    best = cost[jnp.arange(12), assign(np.asarray(cost))].mean()
    gaps, entropies = [], []
    for epsilon in (1.0, 0.1, 0.01, 0.002):
        solution = entropic.solve(
            cost, entropic.relative_epsilon(cost, epsilon), tolerance=1e-6, max_iterations=200_000
        )
        gaps.append(float(solution.transport_cost(cost) - best))
        entropies.append(float(solution.relative_entropy(cost)))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3 * float(best)
    assert entropies == sorted(entropies, reverse=True) and entropies[-1] < 0.1
    wide = entropic.solve(cost, 1e4, tolerance=1e-6)
    assert float(wide.relative_entropy(cost)) == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(wide.plan(cost), 1 / 144, rtol=1e-3)


def test_a_small_epsilon_neither_overflows_nor_starves_a_row_in_float32():
    x = jnp.concatenate([jnp.zeros((4, 2)), jnp.full((4, 2), 100.0)])
    cost = entropic.squared_distances(x, x[::-1] + 1.0)
    solution = entropic.solve(cost, 0.1, max_iterations=500)
    plan = solution.plan(cost)
    assert jnp.isfinite(plan).all()
    np.testing.assert_allclose(plan.sum(0), 1 / 8, rtol=1e-4)
    np.testing.assert_allclose(plan.sum(1), 1 / 8, rtol=1e-2)


def test_in_high_dimension_a_fraction_of_the_mean_cost_captures_little_of_the_gain():
    """The trap: both solves converge, and only the share of the gain and the entropy tell them apart."""
    keys = jax.random.split(jax.random.key(0), 3)
    basis = jax.random.normal(keys[0], (16, 1024)) * 0.25
    x_0, x_1 = jax.random.normal(keys[1], (64, 1024)), jax.random.normal(keys[2], (64, 16)) @ basis
    cost = entropic.squared_distances(x_0, x_1)
    exact, mean = float(cost[jnp.arange(64), assign(np.asarray(cost))].mean()), float(cost.mean())
    shares, entropies = [], []
    for epsilon in (0.05 * cost.mean(), entropic.relative_epsilon(cost, 0.05)):
        solution = entropic.solve(cost, epsilon)
        assert bool(solution.converged)
        shares.append((mean - float(solution.transport_cost(cost))) / (mean - exact))
        entropies.append(float(solution.relative_entropy(cost)))
    assert shares[0] < 0.5 < 0.85 < shares[1]
    assert entropies[1] < 0.6 < 0.9 < entropies[0]


def test_a_solve_that_stops_early_reports_it():
    cost = entropic.squared_distances(*jax.random.normal(jax.random.key(0), (2, 16, 2)))
    solution = entropic.solve(cost, 1e-4, max_iterations=10, tolerance=1e-6)
    assert not bool(solution.converged) and int(solution.iterations) == 10
    assert fj.sinkhorn is entropic
