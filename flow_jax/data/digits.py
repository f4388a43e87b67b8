"""Real handwritten digits of 8 x 8 pixels and 17 grey values (Alpaydin and Kaynak 1998), as scikit-learn ships them.

1,797 images; two thirds of each class are to train on, the rest are held out. Needs the extra [digits].
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
    """Images and what they show."""

    images: UInt8[np.ndarray, "N 8 8 1"]
    labels: Int[np.ndarray, " N"]


def load(split: str) -> Digits:
    """The digits of "train" or "held_out".

    Raises:
      UserError: scikit-learn is not installed.
    """
    data = _sklearn("datasets").load_digits()
    images, labels = data.images.astype(np.uint8)[..., None], data.target.astype(np.int32)
    rng = np.random.default_rng(_SPLIT)
    chosen = []
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cut = round(2 * len(rows) / 3)
        chosen.append(rows[:cut] if split == "train" else rows[cut:])
    rows = np.sort(np.concatenate(chosen))
    return Digits(images[rows], labels[rows])


def classifier(train: Digits) -> Any:
    """A support-vector machine that tells digits apart: `classifier(train).predict(images [N, 64])`."""
    return _sklearn("svm").SVC(gamma=0.001).fit(flat(train.images), train.labels)


def flat(images: np.ndarray) -> np.ndarray:
    """Rows of pixels."""
    return np.asarray(images, np.float64).reshape(len(images), -1)


def _sklearn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install 'paligemma-jax[digits]'."
        ) from None
