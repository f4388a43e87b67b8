"""Sweep over the negatives that the sigmoid loss counts: how many of an image's, and which (docs/contrastive.md).

    python train.py --config=configs/siglip_negatives.py

Runs count 4, 16 or 64 negatives of each image, drawn at random, the hardest or the easiest, or all 511. Three seeds at
a batch size of 512, each run on a quarter of the pairs of configs/siglip_batch_size.py. `:quick` is that of
configs/siglip_batch_size.py.
"""

from ml_collections import ConfigDict

from configs import siglip_batch_size as base
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

BATCH_SIZE = 512
NEGATIVES = (("random", BATCH_SIZE - 1), *((by, count) for by in ("random", "hard", "easy") for count in (4, 16, 64)))


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "quick"."""
    arg = parse_arg(arg, quick=False)
    config = base.small_model(base.PAIRS // 4, quick=arg.quick)
    config.sweep.x, config.sweep.series = "loss.negatives", "loss.negatives_by"
    shared = base.overrides(config, "sigmoid", BATCH_SIZE, base.LEARNING_RATES["sigmoid"][BATCH_SIZE])
    runs = {f"{by}-{count}": shared | {"loss.negatives": count, "loss.negatives_by": by} for by, count in NEGATIVES}
    config.sweep.runs = over_seeds(runs, base.seeds(quick=arg.quick))
    return config
