"""Scores: of answers given as text, of boxes."""

from paligemma_jax.metrics.text import Accuracy, RougeSums, exact_match, rouge

__all__ = ["Accuracy", "RougeSums", "exact_match", "rouge"]
