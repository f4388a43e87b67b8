"""Pretraining of the tiny PaliGemma that ships with this package, on synthetic scenes.

    python train.py --config=configs/pretrain.py:vision && python train.py --config=configs/pretrain.py
    python -m paligemma_jax.tasks.export runs/pretrain paligemma_jax/tiny

`:vision` trains the vision tower alone; the second run starts from it and trains the whole model. Both take two to
three hours on 2 CPU cores, 3 GB of memory and 600 MB of cached images (docs/tiny_base.md has costs and scores). The
same command continues an interrupted run. `:smoke` and `:vision,smoke` run for a minute, to show that they work.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is "vision", "smoke", or both joined by a comma."""
    arg = parse_arg(arg, vision=False, smoke=False)
    config = vision() if arg.vision else texts()
    config.optimizer.schedule = "cosine"
    config.optimizer.end_factor = 0.02
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.grad_clip_norm = 1.0
    config.ema_decay = 0.996
    config.log_steps = 50
    config.checkpoint_steps = 250
    config.data.threads = 1
    if arg.smoke:
        config.total_steps, config.eval_steps, config.log_steps = 20, 10, 5
        config.optimizer.warmup_steps, config.init_from = 5, ()
        config.data.num_scenes, config.data.num_held_out = 64, 20
    return config


def vision() -> ConfigDict:
    """Returns the config of the vision tower alone."""
    config = base_config("paligemma_jax.tasks.pretraining.vision:VisionPretraining")
    config.total_steps = 2000
    config.batch_size = 64
    config.eval_steps = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    return config


def texts() -> ConfigDict:
    """Returns the config of the whole model."""
    config = base_config("paligemma_jax.tasks.pretraining:Pretraining")
    config.init_from = ("runs/pretrain-vision",)
    config.total_steps = 7500
    config.batch_size = 16  # images, each with about ten texts
    config.eval_steps = 500
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 100
    # The tower has 0.3 times the rate and a warm-up of 400 updates (PaliGemma, section 3.2).
    config.optimizer.rates = ((r"model/vision/.*", 0.3, 400),)
    return config
