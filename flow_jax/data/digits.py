"""Handwritten digits of 8 x 8 pixels, 17 grey values (Alpaydin and Kaynak 1998), from scikit-learn (extra [digits]).

Of the 1,797 images two thirds of each class are for training and the rest are held out.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from train_jax.core.errors import UserError

LEVELS = 17  # grey values 0 to 16
CLASSES = 10
_SPLIT = 0  # seed of the split


class Digits(NamedTuple):
    """Images and their labels."""

    images: UInt8[np.ndarray, "N 8 8 1"]
    labels: Int[np.ndarray, " N"]


def load(split: str) -> Digits:
    """Loads the digits of a split, "train" or "held_out".

    Raises:
      UserError: scikit-learn is not installed.
    """
    data = _sklearn("datasets").load_digits()
    images, labels = data.images.astype(np.uint8)[..., None], data.target.astype(np.int32)
    rng = np.random.default_rng(_SPLIT)
    parts = []
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cut = round(2 * len(rows) / 3)
        parts.append(rows[:cut] if split == "train" else rows[cut:])
    rows = np.sort(np.concatenate(parts))
    return Digits(images[rows], labels[rows])


def classifier(train: Digits) -> Any:
    """Trains a support-vector machine on digits; `classifier(train).predict(pixels [N, 64])` returns labels."""
    return _sklearn("svm").SVC(gamma=0.001).fit(flat(train.images), train.labels)


def flat(images: np.ndarray) -> np.ndarray:
    """Returns the pixels of each image as a float64 vector."""
    return np.asarray(images, np.float64).reshape(len(images), -1)


def _sklearn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install 'paligemma-jax[digits]'."
        ) from None
