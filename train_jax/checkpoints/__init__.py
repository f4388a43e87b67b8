"""Checkpoints of a run: written, listed, ranked and restored."""
