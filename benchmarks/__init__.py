"""Benchmarks of speed and memory: `python -m benchmarks --suite=cpu|tpu-compile|gpu` (__main__.py)."""
