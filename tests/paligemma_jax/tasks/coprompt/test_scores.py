"""Accuracy and the harmonic mean."""

import numpy as np
import pytest

from paligemma_jax.tasks.coprompt.scores import accuracy, harmonic_mean


def test_accuracy_counts_clear_hits():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.5, 0.5], [np.nan, np.nan]], np.float32)
    assert accuracy(scores, np.array([0, 1, 1, 0, 0])) == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "base, novel, mean", [(0.84, 0.7723, 0.80473), (1.0, 1.0, 1.0), (0.6, 0.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_harmonic_mean(base, novel, mean):
    assert harmonic_mean(base, novel) == pytest.approx(mean, abs=1e-5)
    assert harmonic_mean(novel, base) == harmonic_mean(base, novel)
    if base and novel:
        assert harmonic_mean(base, novel) == pytest.approx(1 / np.mean([1 / base, 1 / novel]))
