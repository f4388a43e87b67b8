"""Checkpoints of a run: saving, listing, ranking and restoring."""

from train_jax.checkpoints.manager import Checkpoints

__all__ = ["Checkpoints"]
