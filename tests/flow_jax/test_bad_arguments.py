"""Arguments of wrong types: each is accepted or refused with a UserError, never with a bare traceback.

Annotations are not executed here, as they are not when a user calls these functions.
"""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import flow_jax as fj
from flow_jax import row_keys
from flow_jax.data import toys
from flow_jax.metrics import moments
from train_jax.core.errors import UserError

X = jnp.array([[0.5, -1.0], [2.0, 0.25], [1.0, 1.0]])
LABELS = jnp.array([0, 1, 2])
KEY = jax.random.key(0)
PATH = fj.paths.CondOT()
SAMPLE = PATH.sample(X, X[::-1], 0.5)
HALF = jnp.full(3, 0.5)
EULER = dict(solver="euler", num_steps=1)
COST = fj.sinkhorn.squared_distances(X, X)


@pytest.fixture(scope="module", autouse=True)
def _as_users_call_it(fast_compilation):
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def still(t, x, *args):
    return 0 * x


def model(t, x, labels):
    return 0 * x


def pairs(x_0, x_1):
    return np.arange(3), np.arange(3)


CALLS = {
    "sample": (fj.sample, dict(velocity=still, x_0=X, t0=0.0, t1=1.0, args=(LABELS,), **EULER)),
    "sample, at times": (fj.sample, dict(velocity=still, x_0=X, solver="euler", times=[0.0, 1.0])),
    "sample, adaptive": (fj.sample, dict(velocity=still, x_0=X, solver="dopri5", rtol=0.1, atol=0.1, max_steps=64)),
    "log_prob": (
        fj.log_prob,
        dict(velocity=still, x_1=X, divergence="exact", num_probes=1, t0=0.0, t1=1.0, args=(), prior=None, **EULER),
    ),
    "log_prob, hutchinson": (
        fj.log_prob,
        dict(velocity=still, x_1=X, divergence="hutchinson", key=KEY, noise="gaussian", num_probes=2, **EULER),
    ),
    "bits_per_dim": (fj.bits_per_dim, dict(log_prob=HALF, size=2, bins=1.0)),
    "image_bits_per_dim": (
        fj.image_bits_per_dim,
        dict(velocity=still, images=np.zeros((3, 1, 1, 1), np.uint8), key=KEY, num_samples=1, levels=256, **EULER),
    ),
    "sample_sde": (fj.sample_sde, dict(velocity=still, x_0=X, path=PATH, key=KEY, num_steps=1, strength=1.0, args=())),
    "exact_divergence": (fj.likelihood.exact_divergence, dict(velocity=lambda x: x, x=X, chunk=2)),
    "mean_flow": (fj.few_step.mean_flow, dict(mean_velocity=still, sample=SAMPLE, end=HALF, power=0.5)),
    "draw_intervals": (fj.few_step.draw_intervals, dict(key=KEY, n=3, times=fj.times.Uniform(), same=0.5)),
    "sample_mean_flow": (fj.few_step.sample_mean_flow, dict(mean_velocity=still, x_0=X, num_steps=1)),
    "MeanVelocity": (fj.few_step.MeanVelocity, dict(model=model, width=4, time_scale=0.1)),
    "reflow_pairs": (fj.few_step.reflow_pairs, dict(velocity=still, x_0=X, **EULER)),
    "Guided": (fj.guidance.Guided, dict(model=model, weight=2.0, null=3, interval=(0.0, 1.0))),
    "change_schedule": (fj.conversions.change_schedule, dict(velocity=still, old=PATH, new=fj.paths.Cosine())),
    "flow_matching": (fj.losses.flow_matching, dict(velocity=still, marginal=still, t=HALF, x=X)),
    "conditional_flow_matching": (fj.losses.conditional_flow_matching, dict(velocity=still, sample=SAMPLE)),
    "coupled_flow_matching": (
        fj.losses.coupled_flow_matching,
        dict(velocity=still, path=PATH, x_0=X, x_1=X, t=HALF, coupling=pairs),
    ),
    "drop_labels": (fj.losses.drop_labels, dict(labels=LABELS, rate=0.5, null=3, keys=KEY)),
    "exact": (fj.couplings.exact, dict(x_0=X, x_1=X)),
    "independent": (fj.couplings.independent, dict(n=3, key=KEY)),
    "within_class": (fj.couplings.within_class, dict(x_0=X, x_1=X, y_0=LABELS, y_1=LABELS)),
    "conditional": (fj.couplings.conditional, dict(x_0=X, x_1=X, c_0=LABELS, c_1=LABELS, weight=1.0)),
    "couplings.sinkhorn": (
        fj.couplings.sinkhorn,
        dict(x_0=X, x_1=X, epsilon=0.1, key=KEY, rounding="draw", tolerance=0.1, max_iterations=10),
    ),
    "greedy_permutation": (fj.couplings.greedy_permutation, dict(score=COST)),
    "over_buffer": (
        lambda **options: list(fj.couplings.over_buffer(**options)),
        dict(x_0=X, x_1=X, batch_size=1, seed=0, coupling=pairs),
    ),
    "quality": (fj.couplings.quality, dict(x_0=X, x_1=X, i=np.arange(3), j=np.arange(3))),
    "squared_distances": (fj.sinkhorn.squared_distances, dict(x=X, y=X)),
    "relative_epsilon": (fj.sinkhorn.relative_epsilon, dict(cost=COST, epsilon=0.1)),
    "solve": (
        fj.sinkhorn.solve,
        dict(cost=COST, epsilon=1.0, a=np.full(3, 1 / 3), b=None, tolerance=0.1, max_iterations=10),
    ),
    "assign": (fj.assignment.assign, dict(cost=np.asarray(COST))),
    "transport": (fj.assignment.transport, dict(cost=np.asarray(COST), a=None, b=None)),
    "semidiscrete_pairs": (fj.large_couplings.semidiscrete_pairs, dict(x_0=X, x_1=X, potential=HALF)),
    "wasserstein": (fj.metrics.wasserstein, dict(a=X, b=X, p=2)),
    "sinkhorn_divergence": (fj.metrics.sinkhorn_divergence, dict(a=X, b=X, epsilon=1.0)),
    "mmd": (fj.metrics.mmd, dict(a=X, b=X, bandwidth=1.0)),
    "energy_distance": (fj.metrics.energy_distance, dict(a=X, b=X)),
    "frechet_distance": (fj.metrics.frechet_distance, dict(features_a=X, features_b=X)),
    "coverage": (fj.metrics.coverage, dict(samples=X, real=X, neighbours=1)),
    "path_energy": (fj.metrics.path_energy, dict(velocity=still, x_0=X, num_steps=1, args=(LABELS,))),
    "straightness": (fj.metrics.straightness, dict(velocity=still, x_0=X, num_steps=1, args=(LABELS,))),
    "Moments.of": (moments.Moments.of, dict(rows=X)),
    "row_keys": (row_keys.row_keys, dict(key=KEY, rows=np.arange(3))),
    "Uniform": (fj.times.Uniform, dict(low=0.0, high=1.0)),
    "Uniform.draw": (fj.times.Uniform().draw, dict(key=KEY, n=3)),
    "Stratified.draw": (fj.times.Stratified().draw, dict(key=KEY, n=3)),
    "LogitNormal": (fj.times.LogitNormal, dict(mean=0.0, std=1.0)),
    "LogitNormal.draw": (fj.times.LogitNormal().draw, dict(key=KEY, n=3)),
    "uniform_grid": (fj.times.uniform_grid, dict(num_steps=3)),
    "edm_grid": (fj.times.edm_grid, dict(num_steps=3, sigma_min=0.1, sigma_max=1.0, rho=2.0)),
    "CondOT": (fj.paths.CondOT, dict(sigma_min=0.0)),
    "VP": (fj.paths.VP, dict(beta_min=0.1, beta_max=1.0)),
    "VE": (fj.paths.VE, dict(sigma_min=0.1, sigma_max=1.0)),
    "Polynomial": (fj.paths.Polynomial, dict(n=2.0)),
    "CFM": (fj.paths.CFM, dict(sigma=0.1)),
    "SchrodingerBridge": (fj.paths.SchrodingerBridge, dict(sigma=0.1)),
    "CondOT.sample": (PATH.sample, dict(x_0=X, x_1=X, t=HALF)),
    "velocity_to_x1": (PATH.velocity_to_x1, dict(v=X, x_t=X, t=HALF)),
    "CFM.sample": (fj.paths.CFM(0.1).sample, dict(x_0=X, x_1=X, t=HALF, key=KEY)),
    "toys.draw": (toys.draw, dict(name="moons", n=3, seed=0)),
}
BAD = {"None": None, "NaN": math.nan, "text": "a", "a ragged list": [[1.0], [1.0, 2.0]]}
TAKEN = {("bits_per_dim", "log_prob", "NaN")}  # as any number among the data


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_a_wrong_type_raise_user_errors(name):
    call, options = CALLS[name]
    call(**options)
    for argument in options:
        for kind, value in BAD.items():
            if (name, argument, kind) in TAKEN or (value is None and _may_be_none(call, argument)):
                continue
            with pytest.raises(UserError):
                call(**{**options, argument: value})
                pytest.fail(f"{name} takes {kind} for {argument}")


def _may_be_none(call, argument: str) -> bool:
    parameter = inspect.signature(call).parameters.get(argument)
    return parameter is not None and parameter.default is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fj.sample(still, X, "euler", 2.5), "num_steps is 2.5, expected a whole number of at least 1"),
        (lambda: fj.sample(still, X, "euler", 0), "num_steps is 0, expected a whole number of at least 1"),
        (lambda: fj.sample(still, X, "euler", True), "num_steps is True"),
        (lambda: fj.sample(still, X, max_steps=2.5), "max_steps is 2.5"),
        (lambda: fj.sample(still, X, rtol=math.nan), "rtol is nan, expected a finite number of at least 0"),
        (lambda: fj.sample(still, X, t1=math.inf, **EULER), "t1 is inf, expected a finite number"),
        (lambda: fj.sample(3, X, **EULER), "velocity is 3, expected a function or a module"),
        (lambda: fj.few_step.reflow_pairs(None, X, **EULER), "velocity is None"),
        (lambda: fj.log_prob(3, X, **EULER), "velocity is 3"),
        (lambda: fj.log_prob(still, X, prior=3, **EULER), "prior is 3"),
        (lambda: fj.metrics.path_energy("net", X), "velocity is 'net'"),
        (lambda: fj.losses.conditional_flow_matching(3, SAMPLE), "is 3, expected a function"),
        (lambda: fj.sample(still, X, args=jnp.ones(3), **EULER), "expected a tuple of arrays: write args=(labels,)"),
        (lambda: fj.metrics.straightness(still, X, 1, jnp.ones(3)), "expected a tuple of arrays"),
        (lambda: list(fj.couplings.over_buffer(X, X, 3.0, 0)), "batch_size is 3.0, expected a whole number"),
        (lambda: fj.metrics.coverage(X, X, 1.5), "neighbours is 1.5, expected a whole number"),
        (lambda: fj.metrics.wasserstein(X, X, None), "p is None"),
        (lambda: fj.losses.drop_labels(LABELS.astype(jnp.uint8), 1.0, -1, KEY), "null, of uint8 labels, is -1"),
        (lambda: fj.losses.drop_labels(LABELS.astype(jnp.uint8), 1.0, 256, KEY), "from 0 to 255"),
        (lambda: fj.losses.drop_labels(LABELS, 1.0, 9.5, KEY), "is 9.5, expected a whole number"),
        (lambda: fj.losses.drop_labels(LABELS, math.nan, 1, KEY), "rate is nan, expected a finite number from 0 to 1"),
        (lambda: fj.losses.drop_labels(LABELS, 2, 1, KEY), "rate is 2, expected a finite number from 0 to 1"),
        (lambda: fj.losses.drop_labels(LABELS, 0.5, 1, 0), "keys is 0, expected a key of random numbers"),
        (lambda: fj.guidance.Guided(model, 1.0, 9.5)(0.5, X, LABELS), "is 9.5, expected a whole number"),
        (lambda: fj.guidance.Guided(model, math.nan, 3), "the weight of guidance is nan"),
        (lambda: fj.times.edm_grid(3, 2.0, 1.0), "expected sigma_min < sigma_max"),
        (lambda: fj.couplings.independent(2.5, KEY), "n is 2.5"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_numbers_of_other_types_are_accepted():
    steps = np.int64(2)
    np.testing.assert_array_equal(fj.sample(still, X, "euler", steps).x, X)
    assert fj.metrics.coverage(X, X, jnp.int32(1)) == 1.0
    dropped = fj.losses.drop_labels(LABELS, jnp.float32(1.0), 9.0, KEY)
    np.testing.assert_array_equal(dropped, [9, 9, 9])
    jax.jit(lambda rate: fj.losses.drop_labels(LABELS, rate, 3, KEY))(0.5)


@pytest.mark.parametrize("name", ["wasserstein", "sinkhorn_divergence", "mmd", "energy_distance", "frechet_distance"])
def test_metrics_accept_lists(name):
    metric, other = getattr(fj.metrics, name), X[::-1] + 1
    assert metric(X.tolist(), other.tolist()) == pytest.approx(metric(X, other), rel=1e-5)
