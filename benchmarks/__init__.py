"""Benchmarks of speed and memory: `python -m benchmarks --suite=gpu` (__main__.py), and scripts of their own."""
