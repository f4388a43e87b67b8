"""LoRA fine-tuning of PaliGemma on your own images: a folder with JSONL files (docs/data.md has the format).

    python train.py --config=configs/own_data.py --config.data.source=my_data

`my_data` contains the images, train.jsonl and validation.jsonl; a line has the fields "image" (a path), "prefix" and
"suffix". Part of train.jsonl (`data.tune_fraction`, at least one image) is held out to choose the checkpoint by; the
reported scores are those of validation.jsonl.

Without `data.source` it trains the tiny model that ships with the package on the ten rows of docs/sample_data, in a
minute and with less than 2 GB of memory. That shows that everything works; the answers mean nothing. For a real run,
add `--config.model.path=paligemma-3b-pt-224` and lower the rate to about 2e-5.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = base_config("paligemma_jax.tasks.vqa:VQA")
    config.data.name = "jsonl"
    config.data.source = "docs/sample_data"
    config.data.tune_fraction = 0.1
    config.data.prefix_length = 64  # tokens; a longer row ends the run with an error that names it
    config.data.suffix_length = 32
    config.eval.max_new_tokens = 32
    config.eval.candidates = ""  # or the possible answers, as in "cat|dog|bird", to score them by likelihood too
    config.total_epochs = 10.0
    config.batch_size = 4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_percent = 0.1
    config.optimizer.grad_clip_norm = 1.0
    config.log_steps = 5
    config.eval_percent = 0.25
    config.checkpoint_percent = 0.25
    config.best_metric = "loss"
    config.best_mode = "min"
    config.load_best_at_end = True
    return config
