"""Tasks: each module or package holds a class that extends train_jax.task.Task."""
