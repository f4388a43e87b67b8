"""Evaluates a flow in the plane: scores against held-out data, and figures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from flow_jax.data import toys
from flow_jax.metrics import distances
from flow_jax.ode import likelihood, sampling
from flow_jax.tasks import plane_figures
from flow_jax.tasks.flow_task import solver_arguments

Curve = list[tuple[int, float]]  # x and y, for the plots of a sweep
FRAMES = 41  # of the animation, and times of the trajectories

STEPS = (1, 2, 4, 8, 16, 32)  # of the midpoint rule, each of two evaluations
HISTOGRAM = 100_000  # points of the data in the density plot's histogram


class Distance(NamedTuple):
    """Mean W2 between samples and held-out data, and the evaluations per batch of samples."""

    w2: float
    nfe: float


def evaluate(model: nnx.Module, path: Any, data: ConfigDict, options: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Returns the content of `eval.json`, and draws figures.

    w2              mean W2 between `num_samples` samples and as many held-out points, over `draws` of both
    w2_data         the same between two draws of the data, the value of a perfect model
    nll             mean -log p of held-out data in nats; None if the flow does not start from a Gaussian
    nfe             evaluations of the model for a batch of samples
    straightness    mean of |velocity - (x_1 - x_0)|^2 along trajectories, 0 for straight lines
    path_energy     mean of |velocity|^2 along trajectories, at least the squared W2 of noise and samples
    coverage        share of held-out points with a sample among their nearest neighbours (Naeem et al. 2020)
    error_by_nfe    [evaluations, root mean square distance between samples of the midpoint rule and of the solver]
    w2_by_step      [updates, w2] of the evaluations during training
    """
    sample_distance = distance(model, path, data, options, options.draws)
    x_0, held_out = _noise(path, data, options, 0), _held_out(data, options, 0)
    grid = jnp.linspace(0.0, 1.0, FRAMES)
    result = sampling.sample(model, x_0, "rk4", times=grid, trajectory=True)
    trajectories = np.asarray(result.trajectory)
    results = {
        "examples": len(held_out),
        "w2": sample_distance.w2,
        "w2_data": distance_of_data(data, options, options.draws),
        "nll": None,
        "nfe": sample_distance.nfe,
        "straightness": distances.straightness(model, x_0),
        "path_energy": distances.path_energy(model, x_0),
        "coverage": distances.coverage(trajectories[-1], held_out),
        "error_by_nfe": _errors(model, x_0, options),
        "w2_by_step": _w2_by_step(workdir),
    }
    plane_figures.draw_samples(workdir / "samples.png", held_out, trajectories[-1], np.asarray(x_0))
    plane_figures.draw_field(workdir / "field.png", model, trajectories, np.asarray(grid))
    plane_figures.draw_trajectories(workdir / "trajectories.png", trajectories)
    plane_figures.animate(workdir / "flow.gif", trajectories)
    if data.noise == "gaussian":
        results["nll"] = -float(np.mean(_log_density(model, path, options)(held_out)))
        points = toys.draw(data.name, HISTOGRAM, (options.seed, 2))
        plane_figures.draw_density(workdir / "density.png", points, _log_density(model, path, options))
    return results | {"w2_ratio": results["w2"] / results["w2_data"]}


def _errors(model: nnx.Module, x_0: jax.Array, options: ConfigDict) -> Curve:
    exact = sampling.sample(model, x_0, **solver_arguments(options)).x
    curve = []
    for num_steps in STEPS:
        r = sampling.sample(model, x_0, "midpoint", num_steps)
        curve.append((int(r.nfe), float(jnp.sqrt(((r.x - exact) ** 2).sum(1).mean()))))
    return curve


def _w2_by_step(workdir: Path) -> Curve:
    """Returns the W2 of the evaluations during training from the run's log; for repeated steps the last one."""
    log = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    w2 = {line["step"]: line["eval/w2"] for line in lines if "eval/w2" in line}
    return sorted(w2.items())


def distance(model: nnx.Module, path: Any, data: ConfigDict, options: ConfigDict, draws: int) -> Distance:
    """Returns the mean W2 between samples and held-out data over `draws` of both, for a model trained along `path`."""
    values, nfe = [], []
    for draw in range(draws):
        result = sampling.sample(model, _noise(path, data, options, draw), **solver_arguments(options))
        values.append(distances.wasserstein(np.asarray(result.x), _held_out(data, options, draw), p=2))
        nfe.append(int(result.nfe))
    return Distance(float(np.mean(values)), float(np.mean(nfe)))


def distance_of_data(data: ConfigDict, options: ConfigDict, draws: int) -> float:
    """Returns the mean W2 between two draws of the data, over `draws` such pairs."""
    pairs = ((_held_out(data, options, draw), _held_out(data, options, draws + draw)) for draw in range(draws))
    return float(np.mean([distances.wasserstein(one, other, p=2) for one, other in pairs]))


def _held_out(data: ConfigDict, options: ConfigDict, draw: int) -> np.ndarray:
    return toys.draw(data.name, options.num_samples, (options.seed, 0, draw))


def _noise(path: Any, data: ConfigDict, options: ConfigDict, draw: int) -> jax.Array:
    return path.start(toys.draw(data.noise, options.num_samples, (options.seed, 1, draw)))


def _log_density(model: nnx.Module, path: Any, options: ConfigDict):
    prior = likelihood.start_log_prob(path.start)
    return lambda points: np.asarray(
        likelihood.log_prob(model, points, prior=prior, **solver_arguments(options)).log_prob
    )
