"""The model of a task on its mesh, as the loop and the evaluation place it."""

from train_jax.step import placement
from train_jax.task import Task


def placed_model(task: Task, training: bool = False) -> placement.PlacedModel:
    """Returns the model before training; with `training` the one that the loss reads."""
    model = task.init_for_training() if training else task.init()
    return placement.place(model, task.trainable(), task.sharding_rules(), task.mesh)
