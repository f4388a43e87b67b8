"""Pretrains the small base that ships with this package."""

from paligemma_jax.tasks.pretraining.task import Pretraining

__all__ = ["Pretraining"]
