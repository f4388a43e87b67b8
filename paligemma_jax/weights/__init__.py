"""Checkpoint formats, read and written by declarative name tables."""

from paligemma_jax.weights.big_vision import save_big_vision
from paligemma_jax.weights.hugging_face import save_hugging_face
from paligemma_jax.weights.native import save_orbax

__all__ = ["save_big_vision", "save_hugging_face", "save_orbax"]
