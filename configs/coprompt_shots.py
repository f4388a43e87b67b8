"""Sweep over 1 to 16 training images of a class, by four methods, three seeds each (docs/coprompt.md).

    python train.py --config=configs/coprompt_shots.py

tunes configs/coprompt.py on all classes and tests it on all of them (protocol few_shot). `sweep.png` has a line for
each method. Arguments are those of configs/coprompt.py: `:turned`, `:clip_b16`, `dataset=` (as in
`:clip_b16,dataset=oxford_pets`) and `:smoke`.
"""

from ml_collections import ConfigDict

from configs import coprompt
from paligemma_jax.data.few_shot.protocols import SHOTS
from paligemma_jax.tasks.coprompt.config import method_overrides
from train_jax.sweep.seeds import over_seeds

METHODS = ("coop", "maple", "adapters", "coprompt")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is an argument of configs/coprompt.py."""
    config = coprompt.get_config(arg)
    config.protocol = "few_shot"
    config.sweep.metric, config.sweep.x, config.sweep.series = "accuracy", "shots", "method"
    config.sweep.runs = over_seeds(
        {f"{name}-{shots}": method_overrides(config, name, shots=shots) for shots in SHOTS for name in METHODS}
    )
    return config
