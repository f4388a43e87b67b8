"""Arrays whose shapes do not match are refused, where NumPy or JAX would broadcast or clip; errors name the shapes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
from flow_jax.metrics.moments import Moments
from train_jax.core.errors import UserError

X, COLUMN = jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 1))
KEY = jax.random.key(0)
PATH = fj.paths.CondOT()
S = PATH.sample(X, X[::-1], 0.5)
ROW = PATH.sample(X[:, 0], X[::-1, 0], 0.5)  # data [B]


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


def narrow(t, x, *args):
    return jnp.ones((len(x), 1))


def wide(t, x, *args):
    return jnp.ones((len(x), *x.shape))[..., 0] if x.ndim > 1 else x[:, None]


def still(t, x, *args):
    return 0 * x


def imaginary(t, x, *args):
    return 1j * x


VELOCITIES = {
    "sample": lambda v: fj.sample(v, X, "euler", 1),
    "sample, adaptive": lambda v: fj.sample(v, X),
    "sample, rows on their own": lambda v: fj.sample(v, X, per_sample=True),
    "log_prob": lambda v: fj.log_prob(v, X),
    "log_prob, hutchinson": lambda v: fj.log_prob(v, X, "hutchinson", KEY, solver="heun", num_steps=1),
    "image_bits_per_dim": lambda v: fj.image_bits_per_dim(v, jnp.zeros((4, 3), jnp.uint8).reshape(4, 1, 1, 3), KEY),
    "sample_sde": lambda v: fj.sample_sde(v, X, PATH, KEY, 1),
    "sample_mean_flow": lambda v: fj.few_step.sample_mean_flow(v, X),
    "reflow_pairs": lambda v: fj.few_step.reflow_pairs(v, X, solver="euler", num_steps=1),
    "path_energy": lambda v: fj.metrics.path_energy(v, X, 1),
    "straightness": lambda v: fj.metrics.straightness(v, X, 1),
    "mean_flow": lambda v: fj.few_step.mean_flow(v, S, S.t),
    "flow_matching": lambda v: fj.losses.flow_matching(v, still, S.t, X),
    "flow_matching, the marginal": lambda v: fj.losses.flow_matching(still, v, S.t, X),
    "conditional_flow_matching": lambda v: fj.losses.conditional_flow_matching(v, S),
    "coupled_flow_matching": lambda v: fj.losses.coupled_flow_matching(v, PATH, X, X, S.t, fj.couplings.exact),
    "change_schedule": lambda v: fj.conversions.change_schedule(v, PATH, PATH)(0.5, X),
    "Guided": lambda v: fj.guidance.Guided(v, 2.0, 3, (0.2, 0.5))(0.1, X, jnp.arange(4)),
}


@pytest.mark.parametrize("name", VELOCITIES)
@pytest.mark.parametrize("velocity", [narrow, wide, imaginary])
def test_a_velocity_has_the_shape_of_x(name, velocity):
    with pytest.raises(UserError, match=r"the velocity is (float32|complex64)\[\d, .* where x is float32\[\d, "):
        VELOCITIES[name](velocity)


@pytest.mark.parametrize(
    "loss",
    [
        lambda v: fj.losses.conditional_flow_matching(v, ROW),
        lambda v: fj.losses.flow_matching(v, still, ROW.t, ROW.x_t),
        lambda v: fj.few_step.mean_flow(v, ROW, ROW.t),
    ],
)
def test_a_velocity_with_an_extra_axis_is_not_broadcast(loss):
    """[B, 1] against [B]: the mean over all pairs of rows."""
    with pytest.raises(UserError, match=re.escape("the velocity is float32[4, 1] where x is float32[4]")):
        loss(lambda t, x, *args: ROW.dx_t[:, None])
    right = lambda t, x, *args: ROW.dx_t  # noqa: E731
    np.testing.assert_array_equal(fj.losses.conditional_flow_matching(right, ROW), np.zeros(4))


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda: fj.sample(still, X, args=(jnp.arange(1),)), "[1] for x [4, 3]"),
        (lambda: fj.log_prob(still, X, args=(jnp.arange(5),)), "[5] for x [4, 3]"),
        (lambda: fj.sample_sde(still, X, PATH, KEY, 1, args=(jnp.arange(1),)), "[1] for x [4, 3]"),
        (lambda: fj.metrics.straightness(still, X, args=(jnp.arange(1),)), "[1] for x [4, 3]"),
        (lambda: fj.few_step.sample_mean_flow(still, X, 1, jnp.arange(1)), "[1] for x [4, 3]"),
        (
            lambda: fj.losses.coupled_flow_matching(still, PATH, X, X, 0.5, fj.couplings.exact, jnp.arange(2)),
            "[2] for x [4, 3]",
        ),
        (lambda: fj.guidance.Guided(still, 1.0, 0)(0.5, X, jnp.arange(1)), "[1] for x [4, 3]"),
        (lambda: fj.sample(still, jnp.float32(1.0)), "x_0 is float32[]"),
        (lambda: fj.log_prob(still, X, prior=lambda x: x), "log-density has shape [4, 3]"),
        (lambda: fj.losses.conditional_flow_matching(still, S._replace(t=S.t[:, None])), "t has shape [4, 1]"),
        (lambda: fj.losses.conditional_flow_matching(still, S._replace(dx_t=S.dx_t[:1])), "dx_t [1, 3]"),
        (lambda: fj.losses.flow_matching(still, still, S.t[:1], X), "t has shape [1] and x [4, 3]"),
        (lambda: fj.few_step.mean_flow(still, S, jnp.ones((4, 1))), "t has shape [4, 1] and x [4, 3]"),
        (lambda: fj.losses.drop_labels(jnp.arange(4), 0.5, 4, jax.random.split(KEY, 1)), "1 keys"),
        (lambda: fj.losses.drop_labels(jnp.zeros((4, 2), int), 0.5, (1,), KEY), "null is (1,)"),
        (lambda: fj.models.MLP(fj.models.MLPConfig(2, 8, 2), rngs=nnx.Rngs(0))(S.t[:1], X[:, :2]), "t has shape [1]"),
        (
            lambda: fj.models.MLP(fj.models.MLPConfig(2, 8, 2, num_classes=3), rngs=nnx.Rngs(0))(
                0.5, X[:, :2], jnp.arange(1)
            ),
            "[1] for x",
        ),
        (lambda: fj.likelihood.hutchinson_divergence(lambda x: x, X, X[None, :1]), "a probe [1, 3]"),
    ],
)
def test_args_must_have_the_rows_of_x(call, shapes):
    with pytest.raises(UserError, match=re.escape(shapes)):
        call()


PATHS = {
    "CondOT": PATH,
    "VP": fj.paths.VP(),
    "VE": fj.paths.VE(),
    "CFM": fj.paths.CFM(0.1),
    "SchrodingerBridge": fj.paths.SchrodingerBridge(),
    "GaussianPath": fj.paths.GaussianPath(lambda t, x: t * x, lambda t, x: 1 - t),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_refuse_rows_of_two_shapes(name):
    sample = PATHS[name].sample
    noise = {"key": KEY} if name in ("CFM", "SchrodingerBridge") else {}
    for x_0, x_1 in ((X, X[:, None]), (X[:3], X), (X[:1], X), (X[:, :1], X), (X[:, 0], X)):
        shapes = re.escape(f"x_0 has shape {list(x_0.shape)} and x_1 {list(x_1.shape)}")
        with pytest.raises(UserError, match=shapes):
            sample(x_0, x_1, 0.5, **noise)
    for t in (jnp.ones(3), jnp.ones(1), jnp.ones((4, 1))):
        with pytest.raises(UserError, match=re.escape(f"t has shape {list(t.shape)} and x [4, 3]")):
            sample(X, X, t, **noise)
    if noise:
        with pytest.raises(UserError, match=re.escape("x_t has shape [4, 3] and its noise [4, 1]")):
            sample(X, X, 0.5, noise=COLUMN)


@pytest.mark.parametrize(
    ("mu", "sigma", "shape"),
    [
        (lambda t, x: x[:1], lambda t, x: 1 - t, "mu of it [1]"),
        (lambda t, x: x, lambda t, x: x[:1], "sigma of it [1]"),
    ],
)
def test_a_gaussian_paths_functions_keep_the_shape_of_an_example(mu, sigma, shape):
    with pytest.raises(UserError, match=re.escape(f"an example has shape [3] and {shape}")):
        fj.paths.GaussianPath(mu, sigma).sample(X, X, 0.5)


@pytest.mark.parametrize(
    "name", [name for name in dir(PATH) if re.search("_to_(?!noise)", name)] + ["conditional_velocity"]
)
def test_conversions_refuse_arrays_of_two_shapes(name):
    for one, x_t in ((COLUMN, X), (X[:1], X), (X, X[:, None])):
        with pytest.raises(UserError, match=r"shape \[.*\] and \w+ \[.*\], expected one shape"):
            getattr(PATH, name)(one, x_t, 0.5)
    with pytest.raises(UserError, match=re.escape("t has shape [1] and x [4, 3]")):
        getattr(PATH, name)(X, X, jnp.ones(1))


# Couplings.

Y, C = np.arange(4), np.ones((4, 2), np.float32)
COUPLINGS = {
    "exact": lambda a, b: fj.couplings.exact(a, b),
    "within_class": lambda a, b: fj.couplings.within_class(a, b, Y, Y),
    "conditional": lambda a, b: fj.couplings.conditional(a, b, Y, Y),
    "sinkhorn": lambda a, b: fj.couplings.sinkhorn(a, b, key=KEY),
    "sinkhorn, rounded": lambda a, b: fj.couplings.sinkhorn(a, b, rounding="round"),
    "over_buffer": lambda a, b: list(fj.couplings.over_buffer(a, b, 2, 0)),
    "quality": lambda a, b: fj.couplings.quality(a, b, Y, Y),
    "semidiscrete_pairs": lambda a, b: fj.large_couplings.semidiscrete_pairs(a, b, jnp.zeros(len(b))),
    "squared_distances": lambda a, b: fj.sinkhorn.squared_distances(a, b),
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_refuse_rows_of_two_shapes(name):
    for a, b in ((X, X[:, None]), (X, X[:, :2]), (X, X[:, 0]), (X[:0], X[:0])):
        with pytest.raises(UserError, match=re.escape(f"{list(b.shape)}")):
            COUPLINGS[name](a, b)


@pytest.mark.parametrize(
    "name", [name for name in COUPLINGS if name not in ("semidiscrete_pairs", "squared_distances")]
)
def test_couplings_refuse_unequal_numbers_of_rows(name):
    with pytest.raises(UserError):
        COUPLINGS[name](X, X[:3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fj.couplings.within_class(X, X, Y[:, None], Y[:, None]), "labels have shapes [4, 1] and [4, 1]"),
        (lambda: fj.couplings.conditional(X, X, Y, C), "clouds of shapes [4] and [4, 2]"),
        (lambda: fj.couplings.conditional(X, X, Y, Y[:3]), "conditions are int64[4] and int64[3] for 4 and 4 rows"),
        (lambda: fj.couplings.conditional(X, X, Y, Y.astype(np.float32)), "int64[4] and float32[4]"),
        (lambda: fj.couplings.conditional(X, X, Y, Y, -1.0), "weight is -1"),
        (lambda: fj.couplings.quality(X, X, Y[:2], Y), "two lists of indices of one length"),
        (lambda: fj.couplings.quality(X, X, Y, Y + 1), "j has values from 1 to 4 for 4 rows"),
        (lambda: list(fj.couplings.over_buffer(X, X, 0, 0)), "4 rows cannot be divided into batches of 0"),
        (lambda: list(fj.couplings.over_buffer(X, X, 1, 0, lambda a, b: (Y[:2], Y[:2]))), "2 pairs of 4 rows"),
        (
            lambda: fj.losses.coupled_flow_matching(still, PATH, X, X, 0.5, lambda a, b: (Y, Y[:2])),
            "two lists of indices of one length",
        ),
        (lambda: fj.losses.coupled_flow_matching(still, PATH, X, X, 0.5, lambda a, b: (Y, Y + 9)), "from 9 to 12"),
        (lambda: fj.couplings.greedy_permutation(jnp.ones((2, 3))), "scores have shape [2, 3]"),
        (lambda: fj.large_couplings.semidiscrete_pairs(X, X, jnp.zeros(1)), "potential has shape [1]"),
        (lambda: fj.sinkhorn.solve(jnp.ones((2, 3)), 0.1, a=jnp.ones(3) / 3), "weights or potentials of [3] and None"),
        (lambda: fj.sinkhorn.solve(jnp.ones((2, 3)), 0.0), "epsilon is 0"),
        (lambda: fj.sinkhorn.solve(jnp.ones((2, 2)), 0.1, a=jnp.array([1.5, -0.5])), "weights are negative"),
        (lambda: fj.sinkhorn.solve(jnp.ones((2, 2)), 0.1, a=jnp.ones(2)), "weights sum to 2 and 1"),
        (lambda: fj.sinkhorn.solve(jnp.full((2, 2), jnp.nan), 0.1), "not finite"),
        (lambda: fj.sinkhorn.solve(jnp.ones((2, 2)), 0.1).plan(jnp.ones((2, 1))), "a cost of shape [2, 1]"),
        (lambda: fj.assignment.transport(np.ones((2, 3)), a=np.ones(1)), "weights have shapes [1] and [3]"),
        (lambda: fj.assignment.transport(np.full((2, 3), np.nan)), "matrix of finite entries"),
    ],
)
def test_arguments_of_couplings_must_match(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_rows_of_several_labels_differ_if_any_label_does():
    x = np.zeros((4, 1), np.float32)
    labels = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    x_0 = x + np.array([[0.0], [0.1], [0.2], [0.3]], np.float32)
    _, j = fj.couplings.conditional(x_0, x_0, labels, labels[::-1], weight=1e3)
    np.testing.assert_array_equal(j, [3, 2, 1, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_costs_in_half_precision_couple_as_in_float32(dtype):
    x_0, x_1 = (500 * jax.random.normal(key, (64, 8)) for key in jax.random.split(KEY))  # squares beyond 65,504
    low_0, low_1 = (x.astype(dtype) for x in (x_0, x_1))
    same_0, same_1 = (x.astype(jnp.float32) for x in (low_0, low_1))
    for couple in (fj.couplings.exact, lambda a, b: fj.couplings.sinkhorn(a, b, key=KEY)):
        result, want = couple(low_0, low_1)[1], couple(same_0, same_1)[1]
        np.testing.assert_array_equal(result, want)
        assert (np.asarray(result) != np.arange(64)).any()  # what a plan without finite entries would be
    np.testing.assert_allclose(
        fj.metrics.sinkhorn_divergence(low_0, low_1), fj.metrics.sinkhorn_divergence(same_0, same_1), rtol=1e-5
    )


def test_a_cost_in_half_precision_is_solved_in_float32_or_refused():
    cost = 1e4 * jax.random.uniform(KEY, (16, 16))
    low = fj.sinkhorn.solve(cost.astype(jnp.float16), 100.0)
    assert low.f.dtype == jnp.float32 and low.converged
    want = fj.sinkhorn.solve(cost.astype(jnp.float16).astype(jnp.float32), 100.0)
    np.testing.assert_allclose(low.plan(cost), want.plan(cost), rtol=1e-3)
    np.testing.assert_allclose(fj.sinkhorn.relative_epsilon(cost.astype(jnp.float16), 1.0), cost.std(), rtol=1e-2)
    with pytest.raises(UserError, match="not finite: look for NaN and infinity in the data, or convert it to float32"):
        fj.sinkhorn.solve((10 * cost).astype(jnp.float16), 100.0)
    integers = jnp.arange(16).reshape(4, 4)
    np.testing.assert_allclose(fj.sinkhorn.solve(integers, 1.0).f, fj.sinkhorn.solve(integers.astype(float), 1.0).f)


# Metrics.

CLOUDS = {
    "wasserstein": fj.metrics.wasserstein,
    "sinkhorn_divergence": fj.metrics.sinkhorn_divergence,
    "mmd": fj.metrics.mmd,
    "energy_distance": fj.metrics.energy_distance,
    "coverage": lambda a, b: fj.metrics.coverage(a, b, 1),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_metrics_refuse_two_shapes_and_numbers_that_are_not_finite(name):
    for a, b in ((X, X[:, None]), (X, X[:, :1]), (X[:0], X), (X, X[:0])):
        with pytest.raises(UserError, match=re.escape(f"clouds of shapes {list(a.shape)} and {list(b.shape)}")):
            CLOUDS[name](a, b)
    with pytest.raises(UserError, match="1 of 4 rows have NaN or infinity"):
        CLOUDS[name](X.at[0, 0].set(jnp.nan), X)
    assert np.isfinite(CLOUDS[name](X, X[:3]))  # as many rows are not needed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fj.metrics.coverage(X, X), "neighbours=5 for 4 real rows, expected 1 to 3"),
        (lambda: fj.metrics.coverage(X, X, 0), "neighbours=0 for 4 real rows"),
        (lambda: fj.metrics.mmd(X[:1], X, unbiased=True), "clouds of 1 and 4 rows have no unbiased mmd"),
        (lambda: fj.metrics.mmd(X, X, 0.0), "the bandwidth of mmd is 0"),
        (lambda: fj.metrics.mmd(jnp.zeros((4, 1)), jnp.zeros((4, 1)).at[0].set(1.0)), "pass `bandwidth`"),
        (lambda: fj.metrics.wasserstein(X, X, np.nan), "p is nan"),
        (lambda: fj.metrics.frechet_distance(X, X[:, :2]), "features have 3 and 2 entries"),
        (
            lambda: fj.metrics.frechet_distance(X[:1], X),
            "the number of rows is 1, expected at least 2 for a covariance",
        ),
        (lambda: fj.metrics.frechet_distance(X[:, 0], X), "features have shape [4]"),
        (lambda: Moments.of(X.at[0, 0].set(jnp.inf)), "expected finite numbers"),
        (lambda: fj.metrics.straightness(still, X, 0), "num_steps is 0 for 4 rows"),
        (lambda: fj.metrics.path_energy(still, X[:0]), "num_steps is 50 for 0 rows"),
        (lambda: fj.guidance.Guided(still, jnp.ones(4), 0), "the weight of guidance has shape [4]"),
    ],
)
def test_arguments_of_metrics_must_match(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_equal_points_have_distance_zero():
    alike = jnp.ones((5, 2))
    for unbiased in (False, True):
        assert fj.metrics.mmd(alike, alike[:3], unbiased=unbiased) == 0.0
    assert fj.metrics.mmd(alike, alike + 1) > 0
    assert fj.metrics.coverage(alike, alike, 4) == 1.0
    assert fj.metrics.sinkhorn_divergence(alike, alike) == pytest.approx(0.0, abs=1e-6)


# Numbers.


def test_integers_are_converted_to_floats():
    x = np.arange(6).reshape(3, 2)
    ones = lambda t, x, *args: jnp.ones_like(x)  # noqa: E731
    np.testing.assert_allclose(fj.sample(ones, x, "euler", 2).x, x + 1)
    np.testing.assert_allclose(fj.log_prob(ones, x, solver="euler", num_steps=2).x_0, x - 1)
    np.testing.assert_allclose(fj.sample_sde(ones, x, PATH, KEY, 2, 0.0).x, x + 1)
    np.testing.assert_allclose(fj.few_step.sample_mean_flow(ones, x), x + 1)
    np.testing.assert_allclose(PATH.sample(x, x + 1, 0.25).x_t, x + 0.25)
    np.testing.assert_allclose(PATH.velocity_to_x1(np.ones_like(x), x, 0.5), x + 0.5)
    np.testing.assert_array_equal(fj.couplings.exact(x, x[::-1])[1], [2, 1, 0])


def test_half_precision_keeps_the_ends_of_paths_and_squares():
    x = jnp.full((2, 4), 3.0, jnp.float16)
    s = fj.paths.VP().sample(x, x, 1 - 1e-5)  # 1 in float16, where the target is infinite
    assert s.x_t.dtype == jnp.float16 and np.isfinite(s.dx_t).all()
    s = PATH.sample(x, x, 0.5)._replace(dx_t=jnp.full((2, 4), 400.0, jnp.float16))
    np.testing.assert_allclose(fj.losses.conditional_flow_matching(still, s), 160_000.0)
    fast = lambda t, x: jnp.full_like(x, 400.0)  # noqa: E731
    assert fj.metrics.path_energy(fast, x, 2) == pytest.approx(4 * 160_000.0)
    assert fj.log_prob(
        still, jnp.full((1, 4096), 1.0, jnp.float16), "hutchinson", KEY, solver="euler", num_steps=1
    ).log_prob[0] == pytest.approx(-2048 * (1 + np.log(2 * np.pi)), rel=1e-5)


def test_empty_batches_give_empty_samples_or_are_refused():
    assert fj.sample(still, X[:0], "euler", 1).x.shape == (0, 3)
    with pytest.raises(UserError, match=re.escape("x_1 has shape [0, 3], expected a batch that is not empty")):
        fj.log_prob(still, X[:0], solver="euler", num_steps=1)
    for options in ({}, {"per_sample": True}):
        with pytest.raises(
            UserError, match=re.escape("tsit5 cannot choose its steps for shapes [0, 3], which are empty")
        ):
            fj.sample(still, X[:0], **options)
