"""Folders as transformers writes them, read and written."""

from paligemma_jax.weights.hugging_face.paligemma import open_folder, save, save_hugging_face

__all__ = ["open_folder", "save", "save_hugging_face"]
