"""Names in configs of earlier releases, old: new. They translate the config.json of old runs."""

RENAMED_TASKS = {
    "flow_jax.task:PlaneFlow": "flow_jax.tasks.plane:PlaneFlow",
    "flow_jax.image_task:ImageFlow": "flow_jax.tasks.images:ImageFlow",
    "paligemma_jax.tasks.vision_pretraining:VisionPretraining": (
        "paligemma_jax.tasks.pretraining.vision:VisionPretraining"
    ),
}
"""Import paths of tasks, old: new."""

RENAMED_KEYS = {
    "paligemma_jax.tasks.text_to_image:TextToImage": {"told": "conditioning"},
}
"""Config keys by the task that has them, old: new."""

RENAMED_RUN_KEYS = {
    "sweep": "sweep.runs",
    "sweep_metric": "sweep.metric",
    "sweep_x": "sweep.x",
    "sweep_series": "sweep.series",
    "sweep_more": "sweep.more",
    "sweep_curves": "sweep.curves",
}
"""Config keys of the runtime, old: new."""


RENAMED_HOOKS = {
    "harmless_keys": "resume_safe_keys",
    "model_keys": "architecture_keys",
    "companions": "control_runs",
    "single_split": "has_splits, with the opposite value",
}
"""Attributes and methods of tasks, old: new."""


def renamed_keys(task: str | None) -> dict[str, str]:
    """Returns the renamed keys of a task's configs, old: new."""
    return RENAMED_RUN_KEYS | RENAMED_KEYS.get(task or "", {})
