"""Sweep over batch sizes: the sigmoid against the softmax loss, after Zhai et al. 2023 (docs/contrastive.md).

    python train.py --config=configs/siglip_batch_size.py

trains `configs/siglip.py:mini` with either loss at batch sizes 64, 512, 1024, 2048 and 4096, with three seeds and the
same number of pairs in each run, and writes a table (sweep.md) and a figure (sweep.png) of recall and memory against
the batch size. As in the paper's SigLiT runs, the image tower is locked and its features are computed once. The same
command continues an interrupted sweep.

    :quick    an eighth of the pairs, batch sizes 64 and 512, one seed: minutes
    :full     the paper's size: SigLIP B/16 at batch sizes 512 to 1,048,576, on your captions (configs/siglip.py)

The memory that `:full` needs on 16 devices:

    python -m train_jax.plan --config=configs/siglip_batch_size.py:full --devices=16 --mesh=data=16

Studies of the same small model have files of their own: `siglip_learning_rates.py`, `siglip_memory.py`,
`siglip_bias.py`, `siglip_negatives.py` and `siglip_noise.py`.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import siglip
from train_jax.config import parse_arg, refuse_together
from train_jax.sweep.seeds import over_seeds

MOVED = {name: f"configs/siglip_{name}.py" for name in ("memory", "bias", "negatives", "noise")}
MOVED["grid"] = "configs/siglip_learning_rates.py"
BATCH_SIZES = (64, 512, 1024, 2048, 4096)  # between 32 and 512 neither loss changed by more than three points
FULL_BATCH_SIZES = tuple(2**power for power in range(9, 21))  # 512 ... 1,048,576
PAIRS = 100 * BATCH_SIZES[-1]  # pairs seen in a run: 100 updates at the largest batch size
MIN_WARMUP = 50  # updates; see `overrides`
# The best rates of siglip_learning_rates.py, except for the sigmoid loss at 4,096, which has the second best: at the
# best, 1.35e-2, recall was 68.3 % with seed 0 and 51.2 % with seed 1.
LEARNING_RATES = {
    "sigmoid": {64: 4.5e-3, 512: 1.35e-2, 1024: 4.5e-3, 2048: 4.5e-3, 4096: 4.5e-3},
    "softmax": {64: 1.5e-3, 512: 1.35e-2, 1024: 1.35e-2, 2048: 1.35e-2, 4096: 1.35e-2},
}
SCALES = {"sigmoid": 10.0, "softmax": 1 / 0.07}  # initial factor of the cosines, as in the paper of each loss


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "quick" or "full".

    Raises:
      UserError: another argument, or both.
    """
    arg = parse_arg(arg, MOVED, quick=False, full=False)
    refuse_together(arg, ("quick", "full"), "quick shortens the sweep of the small model")
    if arg.full:
        return full_size()
    config = small_model(PAIRS, quick=arg.quick)
    config.sweep.x, config.sweep.series = "batch_size", "loss.name"
    runs = {
        run_name(loss, batch_size, rates[batch_size]): overrides(config, loss, batch_size, rates[batch_size])
        for batch_size in BATCH_SIZES[: 2 if arg.quick else None]
        for loss, rates in LEARNING_RATES.items()
    }
    config.sweep.runs = over_seeds(runs, seeds(quick=arg.quick))
    return config


def small_model(pairs: int, *, quick: bool) -> ConfigDict:
    """Returns `configs/siglip.py:mini` for runs of `pairs` pairs each, or of an eighth of them on fewer scenes."""
    config = siglip.get_config("mini")
    total_examples(config, pairs // 8 if quick else pairs)
    config.data.num_objects = (2, 3)  # captions of one object would repeat within a batch
    config.data.num_held_out = config.data.num_tuning = 500
    if quick:
        config.data.num_scenes, config.data.num_held_out, config.data.num_tuning = 2000, 400, 400
    config.sweep.metric, config.sweep.more = "mean_r1", ("step_temp_bytes",)
    return config


def seeds(*, quick: bool) -> range:
    """Returns the seeds of a sweep: one if quick, else three."""
    return range(1 if quick else 3)


def total_examples(config: ConfigDict, pairs: int) -> None:
    """Sets the length of a run in pairs, independent of its batch size, with one evaluation at its end."""
    config.total_steps = config.eval_steps = config.checkpoint_steps = config.log_steps = None
    config.total_examples = pairs
    config.eval_percent = config.checkpoint_percent = 1.0
    config.log_percent = 0.05
    config.optimizer.warmup_steps, config.optimizer.warmup_percent = None, 0.1


def overrides(config: ConfigDict, loss: str, batch_size: int, rate: float) -> dict[str, Any]:
    """Returns the overrides of a run: the loss, the batch size and the settings that depend on them.

    The initial bias is -log(batch_size), the log-odds of a positive pair; the paper's -10 is that of 32,768.

    The warm-up is a tenth of the run, but at least `MIN_WARMUP` updates, or half of the run where that is less. The
    embeddings of an untrained tower are nearly equal, so one direction of the parameters changes the cosines of all
    pairs together. The softmax loss is invariant to it, since it compares cosines; the sigmoid loss has there a
    gradient tens of times larger than the part that distinguishes pairs, and without a long warm-up Adam's first
    updates overshoot (docs/contrastive.md).
    """
    updates = config.total_examples // batch_size
    return {
        "loss.name": loss,
        "batch_size": batch_size,
        "optimizer.learning_rate": rate,
        "optimizer.warmup_steps": max(updates // 10, min(MIN_WARMUP, updates // 2)),
        "init.scale": SCALES[loss],
        "init.bias": -math.log(batch_size),
    }


def run_name(loss: str, batch_size: int, rate: float) -> str:
    """Returns the name of a run before its seed: this sweep and siglip_learning_rates.py share runs in one workdir."""
    return f"{loss}-{batch_size}-{rate:g}"


def full_size() -> ConfigDict:
    """Returns the sweep of the paper's size, at its learning rate and bias; large batches are embedded in parts."""
    config = siglip.get_config("b16")
    config.model.remat = "block"  # with parts of 4,096 rows, so that it fits on fewer devices
    total_examples(config, 3_000_000_000)
    config.sweep.metric, config.sweep.more = "mean_r1", ("step_temp_bytes",)
    config.sweep.x, config.sweep.series = "batch_size", "loss.name"
    config.sweep.runs = tuple(
        (
            f"{loss}-{batch_size}",
            {
                "loss.name": loss,
                "batch_size": batch_size,
                "init.scale": scale,
                "embed_micro_batch": min(batch_size, 4096),
            },
        )
        for batch_size in FULL_BATCH_SIZES
        for loss, scale in SCALES.items()
    )
    return config
