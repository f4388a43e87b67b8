"""Tasks of flow matching, which implement train_jax.task.Task."""
