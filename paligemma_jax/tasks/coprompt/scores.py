"""Scores of few-shot classification. Axes: N images, C classes."""

import numpy as np
from jaxtyping import Float, Int

from paligemma_jax.zero_shot import recall


def accuracy(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """Returns the share of images, 0 to 1, whose class alone has the highest score; ties count as wrong."""
    return recall(scores, labels, (1,))[1]


def harmonic_mean(base: float, novel: float) -> float:
    """Returns 2 b n / (b + n) of two accuracies (Xian et al. 2017, equation 2); 0 if both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
