"""Pretrains the small PaliGemma that ships with this package, on synthetic scenes.

    python train.py --config=configs/pretrain.py
    python -m paligemma_jax.tasks.export runs/pretrain paligemma_jax/tiny

The first command takes hours on 2 CPU cores (see docs/tiny_base.md for what it cost and scored), about 2 GB of memory and
250 MB of cache; interrupt it as you like, the same command goes on. `:smoke` runs a minute to show that it works.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "smoke" for a short run."""
    arg = parse_arg(arg, smoke=False)
    config = base_config("paligemma_jax.tasks.pretraining:Pretraining")
    config.total_steps = 3500
    config.batch_size = 16  # images; each carries about eight texts
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.end_factor = 0.02
    config.optimizer.warmup_steps = 200
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.grad_clip_norm = 1.0
    # The tower follows more slowly than the decoder, and warms up longer (PaliGemma, section 3.2).
    config.optimizer.rates = ((r"model/vision/.*", 0.5, 500),)
    config.ema_decay = 0.999
    config.log_steps = 50
    config.eval_steps = 1000
    config.checkpoint_steps = 250
    config.data.threads = 1
    if arg.smoke:
        config.total_steps, config.eval_steps, config.log_steps = 20, 10, 5
        config.optimizer.warmup_steps, config.optimizer.rates = 5, ()
        config.data.num_scenes, config.data.num_held_out = 64, 20
    return config
