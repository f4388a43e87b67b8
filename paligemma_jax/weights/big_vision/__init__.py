"""big_vision's npz files, read and written."""

from paligemma_jax.weights.big_vision.paligemma import decoder_config, model_config, open_file, rows, save_big_vision

__all__ = ["decoder_config", "model_config", "open_file", "rows", "save_big_vision"]
