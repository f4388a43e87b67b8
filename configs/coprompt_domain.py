"""Sweep over methods for domain generalisation: tuned in one style, tested in others, three seeds (docs/coprompt.md).

    python train.py --config=configs/coprompt_domain.py

runs configs/coprompt.py by the protocol domain_generalization. For your own images, set `--config.data.targets` to the
data sets to test on. Arguments are those of configs/coprompt.py: `:turned`, `:clip_b16`, `dataset=` (as in
`:clip_b16,dataset=oxford_pets`) and `:smoke`.
"""

from ml_collections import ConfigDict

from configs import coprompt
from paligemma_jax.tasks.coprompt.config import method_overrides
from train_jax.sweep.seeds import over_seeds

METHODS = ("zero_shot", "coop", "maple", "adapters", "coprompt")
STYLES = ("plain", "turned", "bright", "dark_floor", "noise", "low_resolution")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is an argument of configs/coprompt.py."""
    config = coprompt.get_config(arg)
    config.protocol = "domain_generalization"
    if config.data.name == "scenes":
        config.data.target_styles = tuple(style for style in STYLES if style != config.data.style)
    runs = {name: method_overrides(config, name) for name in METHODS}
    runs["no_consistency"] = method_overrides(config, "coprompt", **{"consistency.weight": 0.0})
    config.sweep.metric, config.sweep.more = "target_mean", ("source", *config.data.target_styles)
    config.sweep.runs = over_seeds(runs)
    return config
