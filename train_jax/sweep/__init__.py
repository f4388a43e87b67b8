"""Trains one config several times under named overrides, and compares the runs in a table and a figure."""

from train_jax.sweep.run import fit

__all__ = ["fit"]
