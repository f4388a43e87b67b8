"""Sweep over the initial bias of the sigmoid loss: -10, -log(batch size), 0, and no bias (docs/contrastive.md).

    python train.py --config=configs/siglip_bias.py

Three seeds at a batch size of 512, each run on a quarter of the pairs of configs/siglip_batch_size.py. `:quick` is that
of configs/siglip_batch_size.py.
"""

import math

from ml_collections import ConfigDict

from configs import siglip_batch_size as base
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

BATCH_SIZE = 512
BIASES = (-10.0, -math.log(BATCH_SIZE), 0.0, None)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "quick"."""
    arg = parse_arg(arg, quick=False)
    config = base.small_model(base.PAIRS // 4, quick=arg.quick)
    config.sweep.series = "loss.name"
    shared = base.overrides(config, "sigmoid", BATCH_SIZE, base.LEARNING_RATES["sigmoid"][BATCH_SIZE])
    runs = {f"bias{bias}": shared | {"init.bias": bias} for bias in BIASES}
    config.sweep.runs = over_seeds(runs, base.seeds(quick=arg.quick))
    return config
