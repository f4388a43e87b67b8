"""Scores of answers given as text and as boxes."""

from paligemma_jax.metrics.text import Accuracy, RougeSums, exact_match, rouge

__all__ = ["Accuracy", "RougeSums", "exact_match", "rouge"]
