"""Runs of flows: each module holds a class that implements train_jax.task.Task."""
