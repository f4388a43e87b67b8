"""What only samples of digits are measured by: how often they are read as asked, how diverse, how near to training."""

from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from scipy.spatial.distance import cdist

from flow_jax.data import digits
from flow_jax.data.digits import Digits, flat
from flow_jax.metrics import distances

SEED = 1000  # of the halves
SPLITS = 10  # halves of the real images that give the spread between two real samples


class DigitScores:
    """Of one sample for every held-out image and its label:

    accuracy   how often a machine trained on real digits reads the label asked for; accuracy_data: of real ones
    mmd        mean over labels between samples and held-out images; mmd_data: between two halves of real ones
    nearest    mean distance of samples to the nearest training image; nearest_data: of held-out images
    """

    def __init__(self):
        self._parts: list[Digits] = []

    def add(self, images: UInt8[np.ndarray, "N 8 8 1"], labels: Int[np.ndarray, " N"]) -> None:
        """Keeps the samples: there are few, and they are small."""
        self._parts.append(Digits(images, labels))

    def results(self) -> dict[str, float]:
        """See the class."""
        drawn = Digits(*(np.concatenate(part) for part in zip(*self._parts, strict=True)))
        train, held_out = digits.load("train"), digits.load("held_out")
        machine = digits.classifier(train)
        found = {
            "accuracy": accuracy(machine, drawn),
            "accuracy_data": accuracy(machine, held_out),
            "mmd": class_mmd(drawn, held_out),
            "mmd_data": mmd_of_data(train, held_out, SEED),
            "nearest": nearest(drawn.images, train),
            "nearest_data": nearest(held_out.images, train),
        }
        return found | {f"{name}_ratio": found[name] / found[f"{name}_data"] for name in ("mmd", "nearest")}


def class_mmd(one: Digits, other: Digits) -> float:
    """Mean over labels of the root of the squared MMD, at the bandwidth of the second's own distances."""
    return float(np.mean([_mmd(one, other, label) for label in map(int, np.unique(one.labels))]))


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


def accuracy(machine: Any, shown: Digits) -> float:
    """How often the machine reads the label."""
    return float((machine.predict(flat(shown.images)) == shown.labels).mean())


def nearest(images: UInt8[np.ndarray, "N 8 8 1"], train: Digits) -> float:
    """Mean distance to the nearest training image."""
    return float(cdist(flat(images), flat(train.images)).min(axis=1).mean())


def _mmd(one: Digits, other: Digits, label: int) -> float:
    a, b = (flat(side.images[side.labels == label]) for side in (one, other))
    bandwidth = float(np.median(cdist(b, b)))
    return distances.mmd(a, b, bandwidth) ** 0.5
