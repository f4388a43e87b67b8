"""Paths by config: each can be chosen, and sampling and likelihood start from its start."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
import train
from flow_jax.data import toys
from flow_jax.ode.likelihood import start_log_prob
from flow_jax.tasks import path_choice, plane_evaluation
from tests.paligemma_jax.mini import ROOT, arguments
from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.task import make_task

FLOW = str(ROOT / "configs/flow_2d.py")
GAUSSIAN = {f"path.{name}": f"tests.flow_jax.tasks.test_path_choice:{name}" for name in ("mu", "std")}


class Exact(nnx.Module):
    """The model that has learned everything."""

    def __init__(self, marginal: fj.marginals.MixtureMarginal):
        self.marginal = marginal

    def __call__(self, t, x):
        return self.marginal.velocity(t, x)


def mu(t, x_1):
    return t * x_1


def std(t, x_1):
    return 1 - t


number = 3


def options(name: str, **changes) -> dict:
    """Of a run along a path."""
    coupling = "sinkhorn" if name == "schroedinger_bridge" else "independent"
    chosen = {"path.name": name, "coupling.name": coupling, "mesh.data": 1} | changes
    return chosen | GAUSSIAN if name == "gaussian" else chosen


def task(name: str, **changes):
    config = command_line.load_from_flags(arguments(None, options(name, **changes), config=FLOW))[0]
    return make_task(config, sharding.make_mesh(config.mesh))


def test_every_path_can_be_chosen():
    kinds = {type(task(name).path) for name in path_choice.PATHS}
    known = {getattr(fj.paths, name) for name in fj.paths.__all__} - {fj.paths.PathSample}
    assert kinds == {kind for kind in known if not inspect.isabstract(kind)}


@pytest.mark.parametrize(
    ("name", "changes", "path"),
    [
        ("ve", {"path.ve_sigma_max": 8.0}, fj.paths.VE(0.01, 8.0)),
        ("polynomial", {"path.degree": 3.0}, fj.paths.Polynomial(3.0)),
        ("linear_vp", {}, fj.paths.LinearVP()),
        ("gaussian", {}, fj.paths.GaussianPath(mu, std)),
    ],
)
def test_a_path_takes_its_numbers_from_the_config(name, changes, path):
    chosen = task(name, **changes)
    assert chosen.path == path
    assert (chosen.times.low, chosen.times.high) == path.time_range


def test_a_gaussian_path_by_config_is_that_of_its_functions():
    x_0, x_1, t = jnp.ones((3, 2)), jnp.arange(6.0).reshape(3, 2), jnp.array([0.0, 0.3, 0.9])
    paths = task("gaussian").path, fj.paths.CondOT()
    for one, other in zip(*(path.sample(x_0, x_1, t) for path in paths), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ve", {"path.ve_sigma_min": 60.0}, "VE(sigma_min=60.0, sigma_max=50.0): expected 0 < sigma_min"),
        ("polynomial", {"path.degree": 0.5}, "config.path.degree=0.5, expected 1 or more: change it"),
        ("bridge", {}, "config.path.name='bridge', expected one of cond_ot, cfm, vp, linear_vp, ve, cosine"),
    ],
)
def test_mistakes(name, changes, message):
    with pytest.raises(UserError) as error:
        task(name, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "path.mu=None, expected 'package.module:function'"),
        ({"path.mu": "tests.flow_jax.tasks.test_path_choice:nu"}, "tests.flow_jax.tasks.test_path_choice has no 'nu'"),
        (
            GAUSSIAN | {"path.std": "tests.flow_jax.tasks.test_path_choice:number"},
            "is not a function (t, x_1) of one example",
        ),
    ],
)
def test_a_gaussian_path_needs_its_functions(changes, message):
    config = command_line.load_config(FLOW)
    command_line.override(config, {"path.name": "gaussian"} | changes)
    with pytest.raises(UserError) as error:
        path_choice.make_path(config.path)
    assert message in str(error.value)


def test_sampling_and_likelihood_start_from_the_paths_start():
    path, spread = fj.paths.VE(0.01, 20.0), 0.5
    exact = fj.marginals.MixtureMarginal(path, np.zeros((1, 2)), spread).velocity
    x_0 = jax.random.normal(jax.random.key(0), (500, 2))
    x = fj.sample(exact, path.start(x_0)).x
    np.testing.assert_allclose(x, spread * x_0, atol=5e-3)  # the flow of a Gaussian is linear
    log_prob = fj.log_prob(exact, x, prior=start_log_prob(path.start)).log_prob
    truth = -0.5 * ((x / spread) ** 2).sum(1) - np.log(2 * np.pi * spread**2)
    np.testing.assert_allclose(log_prob, truth, atol=5e-3)


def test_the_starts_of_all_paths():
    x_0 = jnp.array([[1.0, -2.0], [0.5, 0.0]])
    for name in path_choice.PATHS:
        scale = 50.0 if name == "ve" else 1.0
        start = task(name).path.start
        np.testing.assert_allclose(start(x_0), scale * x_0, rtol=1e-6)
        want = fj.likelihood.standard_normal_log_prob(x_0) - 2 * np.log(scale)
        np.testing.assert_allclose(start_log_prob(start)(scale * x_0), want, rtol=1e-6)


def test_the_scores_of_a_perfect_model_along_ve_are_those_of_the_data():
    config = command_line.load_from_flags(arguments(None, {"eval.num_samples": 200}, config=FLOW))[0]
    path = fj.paths.VE(0.01, 50.0)
    data = toys.draw(config.data.name, 200, (config.eval.seed, 0, 0))  # the held-out points themselves
    exact = Exact(fj.marginals.MixtureMarginal(path, data, 0.02))
    w2 = plane_evaluation.distance(exact, path, config.data, config.eval, 1).w2
    assert w2 < 1.3 * plane_evaluation.distance_of_data(config.data, config.eval, 1)


def test_a_run_along_ve(tmp_path):
    short = {
        "total_steps": 4,
        "eval_steps": 4,
        "checkpoint_steps": 4,
        "log_steps": 2,
        "batch_size": 16,
        "optimizer.warmup_steps": 1,
        "model.width": 16,
        "model.depth": 2,
        "data.num_examples": 100,
        "eval.num_samples": 50,
        "eval.draws": 1,
        "eval.validation_draws": 1,
        "eval.solver": "euler",
        "eval.num_steps": 2,
    }
    train.main(arguments(tmp_path, options("ve") | short, config=FLOW))
    results = json.loads((tmp_path / "eval.json").read_text())
    # An untrained model is nearly still: samples stay where they start, which is fifty times as far out as noise.
    assert results["w2"] > 20 and results["nll"] == pytest.approx(np.log(2 * np.pi * 50**2), rel=0.05)
