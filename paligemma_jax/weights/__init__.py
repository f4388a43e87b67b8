"""Checkpoint formats, read and written by declarative name tables."""
