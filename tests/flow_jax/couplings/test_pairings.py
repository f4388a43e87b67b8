"""Couplings: exact ones are permutations and equal the reference's; Sinkhorn's scale; classes; the buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
COST = {"float64": 1e-9, "float32": 1e-5}


def test_the_exact_coupling_is_the_references_permutation(golden_case, precision):
    case = golden_case("flow_coupling")
    i, j = fj.couplings.exact(case["x0"], case["x1"])
    np.testing.assert_array_equal(i, np.arange(len(i)))
    np.testing.assert_array_equal(j, case["perm"])
    quality = fj.couplings.quality(case["x0"], case["x1"], i, j)
    assert quality.cost == pytest.approx(case["exact_cost"], rel=COST[precision])
    assert quality.independent_cost == pytest.approx(case["independent_cost"], rel=COST[precision])
    assert quality.gain_share == 1.0
    same = fj.couplings.quality(case["x0"], case["x1"], i, i)
    assert same.cost == pytest.approx(case["identity_cost"], rel=COST[precision])


def test_pairs_of_the_paths_golden(golden_case, precision):
    case = golden_case("flow_paths")
    i, j = fj.couplings.exact(case["x0"], case["x1"])
    np.testing.assert_array_equal(j, case["exactot_perm"])
    # torchcfm draws with replacement: of these 16 rows it used fewer; ours uses each once.
    assert len(set(case["exactot_draw_i"])) < len(i) == len(set(i)) == len(set(j))


def test_the_exact_plan_of_any_weights(golden_case, precision):
    case = {key: np.asarray(value, np.float64) for key, value in golden_case("flow_coupling").items()}
    cost = case["cost"][:, : len(case["rect_b"])]
    plan = fj.assignment.transport(cost, case["rect_a"], case["rect_b"])
    rtol = COST[precision]
    np.testing.assert_allclose((plan * cost).sum(), case["rect_cost"], rtol=rtol)
    np.testing.assert_allclose(plan, case["rect_plan"], atol=rtol * plan.max())


def test_rows_of_images_couple_and_keep_their_shape():
    x = np.random.default_rng(0).normal(size=(6, 4, 4, 3)).astype(np.float32)
    order = np.array([3, 0, 5, 1, 2, 4])
    _, j = fj.couplings.exact(x, x[order] + 0.01)
    np.testing.assert_array_equal(order[j], np.arange(6))
    with pytest.raises(UserError, match="have no distance"):
        fj.couplings.exact(x, x[:, :2])
    with pytest.raises(UserError, match="of one size"):
        fj.couplings.exact(x, x[:3])


def test_independent_pairs_are_a_permutation_of_the_key():
    i, j = fj.couplings.independent(50, jax.random.key(0))
    np.testing.assert_array_equal(i, np.arange(50))
    np.testing.assert_array_equal(np.sort(j), np.arange(50))
    np.testing.assert_array_equal(j, fj.couplings.independent(50, jax.random.key(0))[1])
    assert (j != fj.couplings.independent(50, jax.random.key(1))[1]).any()


def test_pairs_within_a_class_are_the_references(golden_case, precision):
    case = golden_case("flow_coupling")
    i, j = fj.couplings.within_class(case["x0"], case["x1"], case["y0"], case["y1"])
    np.testing.assert_array_equal(j, case["class_perm"])
    np.testing.assert_array_equal(case["y0"][i], case["y1"][j])
    cost = fj.couplings.quality(case["x0"], case["x1"], i, j).cost
    assert cost == pytest.approx(case["class_cost"], rel=COST[precision])
    # A price for a wrong label large enough is the same coupling, and none the exact one.
    for weight, want in ((1e3, case["class_perm"]), (0.0, case["perm"])):
        _, j = fj.couplings.conditional(case["x0"], case["x1"], case["y0"], case["y1"], weight)
        np.testing.assert_array_equal(j, want)
    with pytest.raises(UserError, match="rows of noise and"):
        fj.couplings.within_class(case["x0"], case["x1"], case["y0"] * 0, case["y1"])


def test_conditions_may_be_vectors():
    """Noise far from everything, conditions on a line: a large weight sorts by condition."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(20, 1))
    x_0, x_1 = rng.normal(size=(2, 20, 3))
    order = rng.permutation(20)
    _, j = fj.couplings.conditional(x_0, x_1, c, c[order], weight=1e6)
    np.testing.assert_array_equal(order[j], np.arange(20))


def test_label_blind_pairs_skew_the_noise_of_a_class_and_pairs_within_a_class_do_not():
    """The trap: of two classes left and right, exact coupling gives each class half of the noise."""
    rng = np.random.default_rng(0)
    x_0, labels = rng.normal(size=(200, 1)), np.repeat([0, 1], 100)
    x_1 = np.where(labels == 1, 3.0, -3.0)[:, None] + 0.1 * rng.normal(size=(200, 1))
    _, blind = fj.couplings.exact(x_0, x_1)
    assert x_0[labels[blind] == 1].mean() > 0.6
    i, j = fj.couplings.within_class(x_0, x_1, rng.permutation(labels), labels)
    assert abs(x_0[i][labels[j] == 1].mean()) < 0.25


def test_sinkhorn_pairs_do_not_depend_on_units_and_gain_what_the_exact_coupling_gains():
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 64, 2)) + jnp.arange(2.0)[:, None, None]
    i, j = fj.couplings.sinkhorn(x_0, x_1, 0.02, jax.random.key(1))
    np.testing.assert_array_equal(i, np.arange(64))
    np.testing.assert_array_equal(j, fj.couplings.sinkhorn(1024 * x_0, 1024 * x_1, 0.02, jax.random.key(1))[1])
    sharp = fj.couplings.quality(x_0, x_1, i, j).gain_share
    wide = fj.couplings.quality(x_0, x_1, i, fj.couplings.sinkhorn(x_0, x_1, 100.0, jax.random.key(1))[1]).gain_share
    assert sharp > 0.9 > 0.4 > wide
    with pytest.raises(UserError, match="pass `key`"):
        fj.couplings.sinkhorn(x_0, x_1)


def test_labels_must_occur_equally_often():
    x, y = np.zeros((5, 2), np.float32), np.array([0, 1, 0, 1])
    with pytest.raises(UserError, match="5 rows of noise with 4 labels and 5 of data with 4, expected equal numbers"):
        fj.couplings.within_class(x, x, y, y)


def test_a_plan_that_is_not_finite_pairs_rows_in_order():
    """So that the row at fault is in the loss, where the step's guard sees it."""
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 8, 2))
    for rounding in ("draw", "round"):
        i, j = fj.couplings.sinkhorn(x_0, x_1.at[3].set(jnp.nan), key=jax.random.key(1), rounding=rounding)
        assert i.tolist() == j.tolist() == list(range(8))


def test_equal_costs_pair_at_random():
    _, j = fj.couplings.sinkhorn(jnp.zeros((64, 2)), jnp.ones((64, 2)), key=jax.random.key(1))
    assert len(set(j.tolist())) > 20
    with pytest.raises(UserError, match="epsilon is 0, expected a number above 0"):
        fj.couplings.sinkhorn(jnp.zeros((4, 2)), jnp.ones((4, 2)), 0.0, jax.random.key(1))


def test_rounded_sinkhorn_pairs_are_a_permutation_near_the_best():
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 64, 2))
    i, j = fj.couplings.sinkhorn(x_0, x_1, 0.01, rounding="round")
    np.testing.assert_array_equal(np.sort(j), np.arange(64))
    assert fj.couplings.quality(x_0, x_1, i, j).gain_share > 0.9


def test_drawn_partners_follow_the_plan():
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 5, 2))
    cost = fj.sinkhorn.squared_distances(x_0, x_1)
    epsilon = fj.sinkhorn.relative_epsilon(cost, 0.3)
    plan = fj.sinkhorn.solve(cost, epsilon).plan(cost)
    keys = jax.random.split(jax.random.key(1), 4000)
    j = jax.vmap(lambda key: fj.couplings.sinkhorn(x_0, x_1, 0.3, key)[1])(keys)
    counts = jnp.stack([(j == column).mean(axis=0) for column in range(5)], axis=1)
    np.testing.assert_allclose(counts, 5 * plan, atol=0.03)


def test_greedy_permutations_take_the_surest_row_first():
    score = jnp.array([[5.0, 4.0, -jnp.inf], [9.0, 1.0, 0.0], [7.0, -jnp.inf, -5.0]])
    np.testing.assert_array_equal(fj.couplings.greedy_permutation(score), [1, 0, 2])
    # A row that has no partner left gets a column all the same.
    score = score.at[2, 2].set(-jnp.inf)
    np.testing.assert_array_equal(fj.couplings.greedy_permutation(score), [2, 0, 1])


def test_a_buffer_couples_better_than_its_batches_and_yields_every_pair_once():
    rng = np.random.default_rng(0)
    x_0, x_1 = rng.normal(size=(2, 64, 2))
    batches = list(fj.couplings.over_buffer(x_0, x_1, 16, seed=3))
    i, j = (np.concatenate(index) for index in zip(*batches, strict=True))
    assert len(batches) == 4 and all(len(rows) == 16 for rows, _ in batches)
    np.testing.assert_array_equal(np.sort(i), np.arange(64))
    np.testing.assert_array_equal(j[np.argsort(i)], fj.couplings.exact(x_0, x_1)[1])
    again = list(fj.couplings.over_buffer(x_0, x_1, 16, seed=3))
    np.testing.assert_array_equal(batches, again)
    alone = [fj.couplings.exact(x_0[k : k + 16], x_1[k : k + 16])[1] + k for k in range(0, 64, 16)]
    cost = fj.couplings.host_cost(x_0, x_1)
    assert cost[i, j].mean() < 0.8 * cost[np.arange(64), np.concatenate(alone)].mean()
    with pytest.raises(UserError, match="cannot be divided"):
        next(fj.couplings.over_buffer(x_0, x_1, 10, seed=0))
