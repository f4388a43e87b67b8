"""LoRA fine-tuning of PaliGemma on your own images, from a folder with JSONL files (docs/data.md has the format).

    python train.py --config=configs/own_data.py --config.data.source=my_data

`my_data` holds train.jsonl and validation.jsonl, lines of {"image", "prefix", "suffix"}, and the images they name. Some
images of train.jsonl (`data.tune_fraction`, one at least) are kept apart to choose the checkpoint by; the scores are
those of validation.jsonl. As it stands it trains the tiny model that ships with the package on the ten rows in
docs/sample_data, in a minute and under 2 GB: it shows that everything works, and its answers mean nothing. For the real
thing add --config.model.path=paligemma-3b-pt-224 and lower the rate to 2e-5 or so.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config


def get_config() -> ConfigDict:
    """The config."""
    config = base_config("paligemma_jax.tasks.vqa:VQA")
    config.data.name = "jsonl"
    config.data.source = "docs/sample_data"
    config.data.tune_fraction = 0.1
    config.data.prefix_length = 64  # tokens; a row that is longer stops the run and says so
    config.data.suffix_length = 32
    config.eval.max_new_tokens = 32
    config.eval.candidates = ""  # or your possible answers, "cat|dog|bird", to score them by likelihood as well
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
