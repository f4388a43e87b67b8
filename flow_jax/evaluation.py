"""Scores of a flow in the plane, against held-out data; and its pictures."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from flow_jax import likelihood, metrics, pictures, sampling, toys
from flow_jax.flow_task import solver

FRAMES = 41  # of the animation, and points in time that trajectories and straightness are measured at

HISTOGRAM = 100_000  # points of the data that their density is drawn from


class Distance(NamedTuple):
    """Mean W2 of samples to held-out data; what the flow cost."""

    value: float
    nfe: float


def evaluate(model: nnx.Module, data: ConfigDict, options: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What `eval.json` holds, and the pictures.

    w2              mean W2 of `num_samples` samples to as many held-out points, over `draws` of both
    w2_data         the same between two draws of the data: what a perfect model would get
    nll             mean -log p of held-out data, nats; None where the flow does not start from a Gaussian
    nfe             evaluations of the model for a batch of samples
    straightness    mean square of |velocity - (x_1 - x_0)| along the way, 0 for straight lines
    path_energy     mean square of |velocity| along the way, at least the squared W2 of noise and samples
    """
    found = distance(model, data, options, options.draws)
    x_0, held_out = _noise(data, options, 0), _held_out(data, options, 0)
    grid = jnp.linspace(0.0, 1.0, FRAMES)
    ways = sampling.sample(model, x_0, "rk4", times=grid, trajectory=True)
    results = {
        "examples": len(held_out),
        "w2": found.value,
        "w2_data": distance_of_data(data, options, options.draws),
        "nll": None,
        "nfe": found.nfe,
        "straightness": metrics.straightness(model, x_0),
        "path_energy": metrics.path_energy(model, x_0),
    }
    trajectories = np.asarray(ways.trajectory)
    pictures.draw_samples(workdir / "samples.png", held_out, trajectories[-1], np.asarray(x_0))
    pictures.draw_field(workdir / "field.png", model, trajectories, np.asarray(grid))
    pictures.draw_trajectories(workdir / "trajectories.png", trajectories)
    pictures.animate(workdir / "flow.gif", trajectories)
    if data.noise == "gaussian":
        results["nll"] = -float(np.mean(_log_density(model, options)(held_out)))
        many = toys.draw(data.name, HISTOGRAM, (options.seed, 2))
        pictures.draw_density(workdir / "density.png", many, _log_density(model, options))
    return results | {"w2_ratio": results["w2"] / results["w2_data"]}


def distance(model: nnx.Module, data: ConfigDict, options: ConfigDict, draws: int) -> Distance:
    """Mean W2 of samples to held-out data over `draws` of both."""
    values, nfe = [], []
    for draw in range(draws):
        result = sampling.sample(model, _noise(data, options, draw), **solver(options))
        values.append(metrics.wasserstein(np.asarray(result.x), _held_out(data, options, draw), p=2))
        nfe.append(int(result.nfe))
    return Distance(float(np.mean(values)), float(np.mean(nfe)))


def distance_of_data(data: ConfigDict, options: ConfigDict, draws: int) -> float:
    """Mean W2 between two draws of the data, over `draws` such pairs."""
    pairs = ((_held_out(data, options, draw), _held_out(data, options, draws + draw)) for draw in range(draws))
    return float(np.mean([metrics.wasserstein(one, other, p=2) for one, other in pairs]))


def _held_out(data: ConfigDict, options: ConfigDict, draw: int) -> np.ndarray:
    return toys.draw(data.name, options.num_samples, (options.seed, 0, draw))


def _noise(data: ConfigDict, options: ConfigDict, draw: int) -> jax.Array:
    return jnp.asarray(toys.draw(data.noise, options.num_samples, (options.seed, 1, draw)))


def _log_density(model: nnx.Module, options: ConfigDict):
    return lambda points: np.asarray(likelihood.log_prob(model, jnp.asarray(points), **solver(options)).log_prob)
