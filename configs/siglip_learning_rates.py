"""Sweep over learning rates: the same four for each loss and batch size of configs/siglip_batch_size.py.

    python train.py --config=configs/siglip_learning_rates.py --workdir=runs/siglip-batch-size

One seed; the metric is recall on tuning scenes, which are neither trained on nor held out. With the same workdir,
configs/siglip_batch_size.py reuses the runs at the rates that it takes from here. `:quick` is that of
configs/siglip_batch_size.py.
"""

from ml_collections import ConfigDict

from configs import siglip_batch_size as base
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

LEARNING_RATES = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "quick"."""
    arg = parse_arg(arg, quick=False)
    config = base.small_model(base.PAIRS, quick=arg.quick)
    config.sweep.metric, config.sweep.more = "tuning_mean_r1", ()
    config.sweep.x, config.sweep.series = "optimizer.learning_rate", "loss.name,batch_size"
    runs = {
        base.run_name(loss, batch_size, rate): base.overrides(config, loss, batch_size, rate)
        for batch_size in reversed(base.BATCH_SIZES[: 2 if arg.quick else None])
        for loss in base.SCALES
        for rate in LEARNING_RATES
    }
    config.sweep.runs = over_seeds(runs, seeds=(0,))
    return config
