"""Sweep over adapter methods: configs/clevr.py trained by each method of docs/peft.md, three seeds each.

    python train.py --config=configs/clevr_peft.py

`sweep.png` shows accuracy against the number of trained parameters. Each method has the learning rate that was tuned
for it on the tiny model. `:smoke` is that of configs/clevr.py.
"""

from ml_collections import ConfigDict

from configs import clevr
from paligemma_jax.tasks.vqa.adapter_config import PRESETS
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "smoke"."""
    parse_arg(arg, smoke=False)
    config = clevr.get_config(arg)
    config.sweep.runs = over_seeds(PRESETS)
    config.sweep.x = "trainable_parameters"
    config.eval.controls = config.eval.before = False  # they do not depend on the method; the default run has them
    return config
