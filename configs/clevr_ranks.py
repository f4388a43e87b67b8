"""Sweep over the rank of LoRA: configs/clevr.py at ranks 1 to 32, three seeds each (docs/sweeps.md).

    python train.py --config=configs/clevr_ranks.py

`sweep.png` shows accuracy against the rank. `:3b`, `:fp16`, `:qlora`, `:int8` and `:smoke` are those of
configs/clevr.py.
"""

from ml_collections import ConfigDict

from configs import clevr
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is one of configs/clevr.py that is named above.

    Alpha is proportional to the rank, so that the scale of the update, alpha / rank, is the same in all runs.
    """
    parse_arg(arg, **dict.fromkeys(("3b", "fp16", "qlora", "int8", "smoke"), False))
    config = clevr.get_config(arg)
    config.sweep.runs = over_seeds(
        {f"rank-{rank}": {"adapter.rank": rank, "adapter.alpha": 4.0 * rank} for rank in (1, 2, 4, 8, 16, 32)}
    )
    config.sweep.x = "adapter.rank"
    config.eval.controls = config.eval.before = False  # they do not depend on the rank; the default run has them
    return config
