"""Few-shot tuning of a dual encoder by CoPrompt, and what it is compared with.

    python train.py --config=configs/coprompt.py

tunes the small SigLIP that ships with the package on 48 of the 96 classes of single synthetic objects, 16 pictures of
each, and tests it on these and on the 48 that it has not seen.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, clip_b16=False)
    config = base_config("paligemma_jax.tasks.coprompt:CoPrompt")
    config.template, config.init_words = "a {}", "one object: a"
    config.data.style = "turned"
    config.total_epochs = 10.0
    config.batch_size = 32
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_percent = 0.1
    config.log_percent = 0.1
    config.eval_percent = config.checkpoint_percent = 1.0
    return config
