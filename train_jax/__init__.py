"""The runtime: one training loop for every task, independent of images, text and flows."""

from train_jax import moved as _moved  # noqa: F401  (registers old import paths)
