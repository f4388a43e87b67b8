"""Data sets of images and texts: JSONL, parquet, CLEVR, TFDS, synthetic scenes."""
