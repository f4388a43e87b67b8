"""Sweep over corrupted training data: a share of the images, of the texts or of the pairs (docs/contrastive.md).

    python train.py --config=configs/siglip_noise.py

Runs corrupt none, a quarter or a half of them, with either loss. Three seeds at a batch size of 512, each run on a
quarter of the pairs of configs/siglip_batch_size.py. `:quick` is that of configs/siglip_batch_size.py.
"""

from ml_collections import ConfigDict

from configs import siglip_batch_size as base
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

BATCH_SIZE = 512
NOISE = (("", 0.0), *((kind, share) for kind in ("images", "texts", "pairs") for share in (0.25, 0.5)))


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "quick"."""
    arg = parse_arg(arg, quick=False)
    config = base.small_model(base.PAIRS // 4, quick=arg.quick)
    config.sweep.x, config.sweep.series = "data.noise_share", "loss.name,data.noise"
    runs = {
        f"{loss}-{kind or 'clean'}-{share}": base.overrides(config, loss, BATCH_SIZE, rates[BATCH_SIZE])
        | {"data.noise": kind, "data.noise_share": share}
        for kind, share in NOISE
        for loss, rates in base.LEARNING_RATES.items()
    }
    config.sweep.runs = over_seeds(runs, base.seeds(quick=arg.quick))
    return config
