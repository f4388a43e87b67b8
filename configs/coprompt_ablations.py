"""Ablations of CoPrompt, after the paper's, three seeds each (docs/coprompt.md).

    python train.py --config=configs/coprompt_ablations.py

Each run changes one thing of CoPrompt, which is `both-1.0` (its lambda): consistency (weight, kind, side), perturbed
inputs, what is attached, layers. On synthetic classes `layers_K` uncouples the prompts too (`depths`). Arguments are
those of configs/coprompt.py: `:turned`, `:clip_b16`, `dataset=` (as in `:clip_b16,dataset=oxford_pets`) and `:smoke`.
"""

from ml_collections import ConfigDict

from configs import coprompt
from paligemma_jax.tasks.coprompt.config import method_overrides
from train_jax.sweep.seeds import over_seeds

DEPTH, WEIGHT = 9, 1.0  # layers that have prompts, and lambda, of the released code's defaults


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep."""
    config = coprompt.get_config(arg)
    weight, own = "consistency.weight", config.consistency.weight or WEIGHT
    runs = {f"both-{own}": {}, "no_consistency": {weight: 0.0}}
    runs |= {f"on_{side}": {"consistency.on": side} for side in ("text", "image")}
    runs |= {"not_perturbed": {"consistency.perturb": False}}
    runs |= {"prompts_only": {"prompts.text_adapter": 0, "prompts.image_adapter": 0}}
    runs |= {"adapters_only": method_overrides(config, "adapters", **{weight: own})}
    runs |= {f"both-{value}": {weight: value} for value in (0.1, 0.5, 1.0, 2.0, 8.0, 32.0) if value != own}
    runs |= {kind: {"consistency.kind": kind} for kind in ("l1", "mse")}
    whole = config.prompts.depth or DEPTH
    layers = [depth for depth in (1, 3, 6, 9, 12) if depth <= vision_depth(config) and depth != whole]
    runs |= {f"layers_{depth}": depths(config, depth) for depth in layers}
    config.sweep.metric, config.sweep.more = "harmonic_mean", ("base", "novel")
    config.sweep.runs = over_seeds({name: {"method": "coprompt"} | changes for name, changes in runs.items()})
    return config


def vision_depth(config: ConfigDict) -> int:
    """Returns the number of layers of the vision tower."""
    return 12 if config.data.name == "images" else 4


def depths(config: ConfigDict, depth: int) -> dict:
    """Prompts in so many layers; in the small SigLIP of the vision tower alone, for which they must not be coupled."""
    if config.data.name == "images":
        return {"prompts.depth": depth}
    return {"prompts.depth": 1, "prompts.vision_depth": depth, "prompts.coupled": False}
