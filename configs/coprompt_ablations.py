"""Ablations of CoPrompt, after those of the paper, three seeds each (docs/coprompt.md).

    python train.py --config=configs/coprompt_ablations.py

Each run changes one setting of CoPrompt: the consistency loss (weight, kind, tower), the perturbed inputs, the learned
parts (prompts or adapters alone) or the number of layers with prompts. The unchanged run is named `both-` and its
weight lambda, as in `both-1.0`. Arguments are those of configs/coprompt.py: `:turned`, `:clip_b16`, `dataset=` (as in
`:clip_b16,dataset=oxford_pets`) and `:smoke`.
"""

from ml_collections import ConfigDict

from configs import coprompt
from paligemma_jax.tasks.coprompt.config import method_overrides
from train_jax.sweep.seeds import over_seeds

DEPTH, WEIGHT = 9, 1.0  # the released code's default number of layers with prompts, and its lambda


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is an argument of configs/coprompt.py."""
    config = coprompt.get_config(arg)
    key, weight = "consistency.weight", config.consistency.weight or WEIGHT
    runs = {f"both-{weight}": {}, "no_consistency": {key: 0.0}}
    runs |= {f"on_{side}": {"consistency.on": side} for side in ("text", "image")}
    runs |= {"not_perturbed": {"consistency.perturb": False}}
    runs |= {"prompts_only": {"prompts.text_adapter": 0, "prompts.image_adapter": 0}}
    runs |= {"adapters_only": method_overrides(config, "adapters", **{key: weight})}
    runs |= {f"both-{other}": {key: other} for other in (0.1, 0.5, 1.0, 2.0, 8.0, 32.0) if other != weight}
    runs |= {kind: {"consistency.kind": kind} for kind in ("l1", "mse")}
    default = config.prompts.depth or DEPTH
    depths = [depth for depth in (1, 3, 6, 9, 12) if depth <= vision_depth(config) and depth != default]
    runs |= {f"layers_{depth}": prompts_in(config, depth) for depth in depths}
    config.sweep.metric, config.sweep.more = "harmonic_mean", ("base", "novel")
    config.sweep.runs = over_seeds({name: {"method": "coprompt"} | changes for name, changes in runs.items()})
    return config


def vision_depth(config: ConfigDict) -> int:
    """Returns the number of layers of the vision tower."""
    return 12 if config.data.name == "images" else 4


def prompts_in(config: ConfigDict, depth: int) -> dict:
    """Returns the overrides for prompts in `depth` layers.

    The small SigLIP's text tower has one layer, so there only the vision tower's depth changes, and prompts of the two
    towers are not coupled.
    """
    if config.data.name == "images":
        return {"prompts.depth": depth}
    return {"prompts.depth": 1, "prompts.vision_depth": depth, "prompts.coupled": False}
