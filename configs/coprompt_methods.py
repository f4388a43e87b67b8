"""Sweep over methods: configs/coprompt.py with CoPrompt and its five baselines, three seeds each (docs/coprompt.md).

    python train.py --config=configs/coprompt_methods.py

`sweep.png` compares the accuracy on the tuned classes with that on the others. Arguments are those of
configs/coprompt.py: `:turned`, `:clip_b16`, `dataset=` (as in `:clip_b16,dataset=oxford_pets`) and `:smoke`.
"""

from ml_collections import ConfigDict

from configs import coprompt
from paligemma_jax.tasks.coprompt.config import method_overrides
from train_jax.sweep.seeds import over_seeds

METHODS = ("zero_shot", "coop", "maple", "adapters", "coprompt", "full")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is an argument of configs/coprompt.py."""
    config = coprompt.get_config(arg)
    config.sweep.metric, config.sweep.more = "harmonic_mean", ("base", "novel")
    config.sweep.runs = over_seeds({name: method_overrides(config, name) for name in METHODS})
    return config
