"""Flow matching of real handwritten digits, 8 x 8 pixels, conditioned on the label. Needs the extra [digits].

    python train.py --config=configs/flow_digits.py

writes samples.png (samples beside held-out digits) and flow.png (digits between noise and data) into the workdir.
eval.json has the share of samples in which a classifier trained on real digits reads the requested label, their
diversity, and their distance to the nearest training images. [digits] installs scikit-learn, which has the images.

    :dit      trains a transformer instead of a U-Net
    :smoke    takes seconds; also `:dit,smoke`
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is "dit", "smoke", or both joined by a comma."""
    arg = parse_arg(arg, dit=False, smoke=False)
    config = base_config("flow_jax.tasks.images:ImageFlow")
    config.coupling.name = "exact"  # within each class
    config.model.unet.multipliers, config.model.unet.attention = (1, 2), (4,)
    config.total_steps = 1200  # after 2,500, samples are nearer to training images than held-out digits are
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.ema_decay = 0.999
    config.log_steps = 100
    config.eval_steps = 400
    config.checkpoint_steps = 400
    if arg.dit:
        config.model.name = "dit"
    if arg.smoke:
        config.total_steps, config.eval_steps, config.checkpoint_steps, config.log_steps = 4, 2, 4, 2
        config.optimizer.warmup_steps = 1
        config.model.unet.width, config.model.unet.head_width = 16, 16
        config.eval.solver, config.eval.num_steps, config.eval.likelihood_examples = "euler", 4, 4
    return config
