"""The runtime: one training loop for any task; knows nothing of images, text or flows."""

from train_jax import moved as _moved  # noqa: F401  (old import paths)
