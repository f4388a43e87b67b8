"""Several runs of one config under named overrides, and their table and figure."""

from train_jax.sweep.run import fit

__all__ = ["fit"]
