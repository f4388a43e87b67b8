"""Checkpoints of a run: written, listed, ranked and restored."""

from train_jax.checkpoints.manager import Checkpoints

__all__ = ["Checkpoints"]
