"""Scores of sampled digits: how often a classifier reads their label, their diversity, their distance to training."""

from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from scipy.spatial.distance import cdist

from flow_jax.data import digits
from flow_jax.data.digits import Digits, flat
from flow_jax.metrics import distances

SEED = 1000  # of the splits for `mmd_of_data`
SPLITS = 10


class DigitScores:
    """Scores one sample for every held-out image and its label, as an `image_datasets.Score`.

    accuracy   share of samples whose label a classifier trained on real digits reads; accuracy_data: of held-out images
    mmd        mean over labels between samples and held-out images; mmd_data: between two samples of real images
    nearest    mean distance of samples to the nearest training image; nearest_data: of held-out images
    """

    def __init__(self):
        self._batches: list[Digits] = []

    def add(self, images: UInt8[np.ndarray, "N 8 8 1"], labels: Int[np.ndarray, " N"]) -> None:
        """Adds a batch of samples; all are kept in memory."""
        self._batches.append(Digits(images, labels))

    def results(self) -> dict[str, float]:
        """Returns the scores, and the ratios of `mmd` and `nearest` to the values of real images."""
        samples = Digits(*(np.concatenate(arrays) for arrays in zip(*self._batches, strict=True)))
        train, held_out = digits.load("train"), digits.load("held_out")
        classifier = digits.classifier(train)
        scores = {
            "accuracy": accuracy(classifier, samples),
            "accuracy_data": accuracy(classifier, held_out),
            "mmd": class_mmd(samples, held_out),
            "mmd_data": mmd_of_data(train, held_out, SEED),
            "nearest": nearest(samples.images, train),
            "nearest_data": nearest(held_out.images, train),
        }
        return scores | {f"{name}_ratio": scores[name] / scores[f"{name}_data"] for name in ("mmd", "nearest")}


def class_mmd(samples: Digits, real: Digits) -> float:
    """Returns the MMD, averaged over labels; the bandwidth is the median distance between real images of a label."""
    return float(np.mean([_mmd(samples, real, label) for label in map(int, np.unique(samples.labels))]))


def mmd_of_data(train: Digits, held_out: Digits, seed: int) -> float:
    """Returns the mean `class_mmd` between two disjoint real samples as large as the held-out set, over ten splits."""
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


def accuracy(classifier: Any, images: Digits) -> float:
    """Returns the share of images whose label the classifier predicts."""
    return float((classifier.predict(flat(images.images)) == images.labels).mean())


def nearest(images: UInt8[np.ndarray, "N 8 8 1"], train: Digits) -> float:
    """Returns the mean distance to the nearest training image."""
    return float(cdist(flat(images), flat(train.images)).min(axis=1).mean())


def _mmd(samples: Digits, real: Digits, label: int) -> float:
    a, b = (flat(part.images[part.labels == label]) for part in (samples, real))
    bandwidth = float(np.median(cdist(b, b)))
    return distances.mmd(a, b, bandwidth) ** 0.5
