"""Runs: each module holds a class that implements train_jax.task.Task."""
