"""Trains a SigLIP on captions of synthetic scenes: images and texts as vectors of one space.

    python train.py --config=configs/siglip.py

The tiny model starts from the vision tower of the tiny PaliGemma that ships with the package
(`--config.init.vision=None` starts from nothing, and takes longer). The workdir gets retrieval and zero-shot scores,
similarity.png (captions against images) and neighbours.png (what is found for a caption). `:clip` trains with the
softmax loss, `:smoke` and `:clip,smoke` for seconds.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "clip", "smoke" or both."""
    arg = parse_arg(arg, clip=False, smoke=False)
    config = base_config("paligemma_jax.tasks.contrastive:Contrastive")
    config.init.vision = "tiny"
    config.total_steps = 1000
    config.batch_size = 64
    config.init.bias = -4.0  # near -log(batch_size); the paper's -10 is for batches of 32,768
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.95
    # 1e-4 in big_vision's sense, which is not multiplied by the rate: 1e-4 / 1e-3 in AdamW's.
    config.optimizer.weight_decay = 0.1
    config.optimizer.weight_decay_mask = r".*/(kernel|embedding)"  # not the scale, the bias and norms
    config.optimizer.grad_clip_norm = 1.0
    config.log_steps = 20
    config.eval_steps = 250
    config.checkpoint_steps = 250
    if arg.clip:
        config.loss.name = "softmax"
        config.init.scale = 1 / 0.07
    if arg.smoke:
        config.total_steps, config.eval_steps, config.checkpoint_steps, config.log_steps = 4, 2, 4, 2
        config.optimizer.warmup_steps = 1
        config.data.num_scenes, config.data.num_held_out = 64, 12
    return config
