"""Data sets of images and texts: JSONL, parquet, CLEVR, TFDS, synthetic scenes."""

from paligemma_jax.data.sources.splits import open_source, training_and_tuning

__all__ = ["open_source", "training_and_tuning"]
