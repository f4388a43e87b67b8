"""Memory of a training step of configs/siglip_batch_size.py: losses in chunks against losses on the full matrix.

    python -m train_jax.plan --config=configs/siglip_memory.py --devices=1

compiles a step of each loss at each batch size, up to the paper's 32,768, and prints its memory; nothing is trained.
`loss.full_matrix` computes the loss from the matrix of all pairs (paligemma_jax/losses/reference.py).
"""

from ml_collections import ConfigDict

from configs import siglip_batch_size as base
from train_jax.config import parse_arg

BATCH_SIZES = (*base.BATCH_SIZES, 32_768)
LEARNING_RATE = 5e-4  # any: the memory of a step does not depend on it


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the runs to be planned; arg must be empty."""
    parse_arg(arg)
    config = base.small_model(base.PAIRS, quick=False)
    config.sweep.x, config.sweep.series = "batch_size", "loss.name,loss.full_matrix"
    config.sweep.runs = tuple(
        (
            f"{loss}-{batch_size}-{'matrix' if full_matrix else 'chunks'}",
            base.overrides(config, loss, batch_size, LEARNING_RATE) | {"loss.full_matrix": full_matrix},
        )
        for batch_size in BATCH_SIZES
        for loss in base.SCALES
        for full_matrix in (False, True)
    )
    return config
