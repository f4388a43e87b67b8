"""Scores of a flow of digits against real ones that were held out; and its pictures. Axes: N images of each side."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from scipy.spatial.distance import cdist

from flow_jax import digits, guidance, image_pictures, likelihood, metrics, sampling
from flow_jax.digits import Digits, flat
from flow_jax.flow_task import solver
from flow_jax.image_pairs import to_levels

FRAMES = 9  # of the picture of the flow
SPLITS = 10  # halves of the real images that give the spread between two real samples


def validate(model: nnx.Module, data: ConfigDict, options: ConfigDict) -> dict[str, float]:
    """The Frechet distance of pixels between samples and held-out images."""
    held_out = digits.load("held_out")
    some = np.linspace(0, len(held_out.labels) - 1, options.validation_samples).astype(int)
    samples, _ = draw(model, held_out.labels[some], data, options)
    return {"frechet": metrics.frechet_distance(flat(samples), flat(held_out.images))}


def evaluate(model: nnx.Module, data: ConfigDict, options: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What `eval.json` holds, of one sample for every held-out image and label, and the pictures.

    frechet           between pixels of samples and held-out images; frechet_data: between training and held-out ones
    accuracy          how often a machine trained on real digits reads the label asked for; accuracy_data: of real ones
    mmd               mean over labels between samples and held-out images; mmd_data: between two halves of real ones
    nearest           mean distance of samples to the nearest training image; nearest_data: of held-out images
    bpd               bits per dimension of held-out images
    nfe               evaluations of the model for the samples
    straightness      mean square of |velocity - (x_1 - x_0)| along the way, 0 for straight lines
    """
    train, held_out = digits.load("train"), digits.load("held_out")
    samples, nfe = draw(model, held_out.labels, data, options)
    drawn = Digits(samples, held_out.labels)
    machine = digits.classifier(train)
    results = {
        "examples": len(samples),
        "frechet": metrics.frechet_distance(flat(samples), flat(held_out.images)),
        "frechet_data": metrics.frechet_distance(flat(train.images), flat(held_out.images)),
        "accuracy": _accuracy(machine, drawn),
        "accuracy_data": _accuracy(machine, held_out),
        "mmd": class_mmd(drawn, held_out),
        "mmd_data": mmd_of_data(train, held_out, options.seed),
        "nearest": _nearest(samples, train),
        "nearest_data": _nearest(held_out.images, train),
        "bpd": _bits_per_dim(model, held_out, options),
        "nfe": nfe,
        "straightness": _straightness(model, held_out.labels, options),
    }
    for name in ("mmd", "nearest"):
        results[f"{name}_ratio"] = results[name] / results[f"{name}_data"]
    image_pictures.draw_grid(workdir / "samples.png", drawn, held_out, digits.LEVELS)
    image_pictures.draw_flow(workdir / "flow.png", _frames(model, options))
    return results


def draw(model: nnx.Module, labels: np.ndarray, data: ConfigDict, options: ConfigDict) -> tuple[np.ndarray, int]:
    """A sample of each label, in grey values, and what they cost."""
    x_0 = jax.random.normal(jax.random.key(options.seed), (len(labels), 8, 8, 1))
    found = sampling.sample(_guided(model, options), x_0, **solver(options), args=(jnp.asarray(labels),))
    return to_levels(np.asarray(found.x), digits.LEVELS, data.dequantize), int(found.nfe)


def class_mmd(one: Digits, other: Digits) -> float:
    """Mean over labels of the root of the squared MMD, at the bandwidth of the second's own distances."""
    return float(np.mean([_mmd(one, other, label) for label in range(digits.CLASSES)]))


def mmd_of_data(train: Digits, held_out: Digits, seed: int) -> float:
    """`class_mmd` of two real samples as large as the held-out one: halves of all real images, mean of ten splits."""
    images = np.concatenate([train.images, held_out.images])
    labels = np.concatenate([train.labels, held_out.labels])
    values = []
    for split in range(SPLITS):
        rng = np.random.default_rng((seed, split))
        halves: tuple[list, list] = ([], [])
        for label in range(digits.CLASSES):
            number = int((held_out.labels == label).sum())
            rows = rng.permutation(np.flatnonzero(labels == label))
            for half, part in zip(halves, (rows[:number], rows[number : 2 * number]), strict=True):
                half.append(part)
        values.append(class_mmd(*(Digits(images[np.concatenate(h)], labels[np.concatenate(h)]) for h in halves)))
    return float(np.mean(values))


def _mmd(one: Digits, other: Digits, label: int) -> float:
    a, b = (flat(side.images[side.labels == label]) for side in (one, other))
    bandwidth = float(np.median(cdist(b, b)))
    return metrics.mmd(a, b, bandwidth) ** 0.5


def _accuracy(machine: Any, shown: Digits) -> float:
    return float((machine.predict(flat(shown.images)) == shown.labels).mean())


def _nearest(images: np.ndarray, train: Digits) -> float:
    return float(cdist(flat(images), flat(train.images)).min(axis=1).mean())


def _bits_per_dim(model: nnx.Module, held_out: Digits, options: ConfigDict) -> float:
    rows = np.linspace(0, len(held_out.labels) - 1, options.likelihood_examples).astype(int)
    bits = likelihood.image_bits_per_dim(
        model,
        held_out.images[rows],
        jax.random.key(options.seed + 1),
        options.likelihood_samples,
        levels=digits.LEVELS,
        divergence=options.divergence,
        args=(jnp.asarray(held_out.labels[rows]),),
        **solver(options),
    )
    return float(np.mean(bits))


def _straightness(model: nnx.Module, labels: np.ndarray, options: ConfigDict) -> float:
    x_0 = jax.random.normal(jax.random.key(options.seed), (len(labels), 8, 8, 1))
    return metrics.straightness(_guided(model, options), x_0, args=(jnp.asarray(labels),))


def _frames(model: nnx.Module, options: ConfigDict) -> np.ndarray:
    """One sample of each label on its way [T, 10, 8, 8, 1], in the model's range."""
    x_0 = jax.random.normal(jax.random.key(options.seed + 2), (digits.CLASSES, 8, 8, 1))
    labels = jnp.arange(digits.CLASSES)
    grid = jnp.linspace(0.0, 1.0, FRAMES)
    ways = sampling.sample(_guided(model, options), x_0, "rk4", times=grid, trajectory=True, args=(labels,))
    return np.asarray(ways.trajectory)


def _guided(model: nnx.Module, options: ConfigDict) -> nnx.Module:
    return model if options.guidance == 1.0 else guidance.Guided(model, options.guidance, digits.CLASSES)
