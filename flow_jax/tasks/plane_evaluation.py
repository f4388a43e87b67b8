"""Scores of a flow in the plane, against held-out data; and its pictures."""

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
from flow_jax.tasks.flow_task import solver

Curve = list[tuple[int, float]]  # x and y, for the plots of a sweep
FRAMES = 41  # of the animation, and points in time of the trajectories

STEPS = (1, 2, 4, 8, 16, 32)  # of midpoint, each of two evaluations
HISTOGRAM = 100_000  # points of the data that their density is drawn from


class Distance(NamedTuple):
    """Mean W2 of samples to held-out data; what the flow cost."""

    value: float
    nfe: float


def evaluate(model: nnx.Module, path: Any, data: ConfigDict, options: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What `eval.json` holds, and the pictures.

    w2              mean W2 of `num_samples` samples to as many held-out points, over `draws` of both
    w2_data         the same between two draws of the data: what a perfect model would get
    nll             mean -log p of held-out data, nats; None where the flow does not start from a Gaussian
    nfe             evaluations of the model for a batch of samples
    straightness    mean square of |velocity - (x_1 - x_0)| along the way, 0 for straight lines
    path_energy     mean square of |velocity| along the way, at least the squared W2 of noise and samples
    coverage        share of held-out points that have a sample among their nearest neighbours (Naeem et al. 2020)
    error_by_nfe    [evaluations, root mean square distance of midpoint's samples to the solver's]
    w2_by_step      [updates, w2] in the course of training
    """
    found = distance(model, path, data, options, options.draws)
    x_0, held_out = _noise(path, data, options, 0), _held_out(data, options, 0)
    grid = jnp.linspace(0.0, 1.0, FRAMES)
    ways = sampling.sample(model, x_0, "rk4", times=grid, trajectory=True)
    trajectories = np.asarray(ways.trajectory)
    results = {
        "examples": len(held_out),
        "w2": found.value,
        "w2_data": distance_of_data(data, options, options.draws),
        "nll": None,
        "nfe": found.nfe,
        "straightness": distances.straightness(model, x_0),
        "path_energy": distances.path_energy(model, x_0),
        "coverage": distances.coverage(trajectories[-1], held_out),
        "error_by_nfe": _errors(model, x_0, options),
        "w2_by_step": _course(workdir),
    }
    plane_figures.draw_samples(workdir / "samples.png", held_out, trajectories[-1], np.asarray(x_0))
    plane_figures.draw_field(workdir / "field.png", model, trajectories, np.asarray(grid))
    plane_figures.draw_trajectories(workdir / "trajectories.png", trajectories)
    plane_figures.animate(workdir / "flow.gif", trajectories)
    if data.noise == "gaussian":
        results["nll"] = -float(np.mean(_log_density(model, path, options)(held_out)))
        many = toys.draw(data.name, HISTOGRAM, (options.seed, 2))
        plane_figures.draw_density(workdir / "density.png", many, _log_density(model, path, options))
    return results | {"w2_ratio": results["w2"] / results["w2_data"]}


def _errors(model: nnx.Module, x_0: jax.Array, options: ConfigDict) -> Curve:
    exact = sampling.sample(model, x_0, **solver(options)).x
    found = []
    for num_steps in STEPS:
        r = sampling.sample(model, x_0, "midpoint", num_steps)
        found.append((int(r.nfe), float(jnp.sqrt(((r.x - exact) ** 2).sum(1).mean()))))
    return found


def _course(workdir: Path) -> Curve:
    """W2 of the evaluations in the course of training, as the run's log has them; the last of equal steps."""
    log = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    found = {line["step"]: line["eval/w2"] for line in lines if "eval/w2" in line}
    return sorted(found.items())


def distance(model: nnx.Module, path: Any, data: ConfigDict, options: ConfigDict, draws: int) -> Distance:
    """Mean W2 of samples to held-out data over `draws` of both; the model was trained along `path`."""
    values, nfe = [], []
    for draw in range(draws):
        result = sampling.sample(model, _noise(path, data, options, draw), **solver(options))
        values.append(distances.wasserstein(np.asarray(result.x), _held_out(data, options, draw), p=2))
        nfe.append(int(result.nfe))
    return Distance(float(np.mean(values)), float(np.mean(nfe)))


def distance_of_data(data: ConfigDict, options: ConfigDict, draws: int) -> float:
    """Mean W2 between two draws of the data, over `draws` such pairs."""
    pairs = ((_held_out(data, options, draw), _held_out(data, options, draws + draw)) for draw in range(draws))
    return float(np.mean([distances.wasserstein(one, other, p=2) for one, other in pairs]))


def _held_out(data: ConfigDict, options: ConfigDict, draw: int) -> np.ndarray:
    return toys.draw(data.name, options.num_samples, (options.seed, 0, draw))


def _noise(path: Any, data: ConfigDict, options: ConfigDict, draw: int) -> jax.Array:
    return path.start(toys.draw(data.noise, options.num_samples, (options.seed, 1, draw)))


def _log_density(model: nnx.Module, path: Any, options: ConfigDict):
    prior = likelihood.start_log_prob(path.start)
    return lambda points: np.asarray(likelihood.log_prob(model, points, prior=prior, **solver(options)).log_prob)
