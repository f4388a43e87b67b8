"""Sigmoid against softmax loss over batch sizes: the ablation of Zhai et al. 2023 in miniature.

    python train.py --config=configs/siglip_batch_size.py

trains both losses at batch sizes 32, 64 ... 4096 with three seeds, each on the same number of pairs, and writes a table
(sweep.md) and a figure (sweep.png): mean recall and memory of the step against the batch size. As in the paper's SigLiT
runs the image tower is locked and its features are computed once. An interrupted sweep goes on with the same command.
`:quick` does it with an eighth of the pairs, at 32, 128 and 512, once.

`:full` is the grid of the paper's size, 512 to a million pairs on SigLIP B/16, on captions of yours (configs/siglip.py
tells how they are given). What it needs on 16 devices:

    python -m train_jax.plan --config=configs/siglip_batch_size.py:full --devices=16 --mesh=data=16

The paper's smaller ablations: `:bias` (of the sigmoid loss, at first: -10, 0 or none), `:negatives` (how many of an
image's negatives count, and which) and `:noise` (spoilt images, texts or pairs).
"""

import math

from ml_collections import ConfigDict

from configs import siglip
from train_jax.config import parse_arg
from train_jax.errors import UserError

SIZES = tuple(2**power for power in range(5, 13))  # 32 ... 4096
FULL_SIZES = tuple(2**power for power in range(9, 21))  # 512 ... 1,048,576
PAIRS = 100 * SIZES[-1]  # seen in a run: 100 updates at the largest batch
STUDY_SIZE, STUDY_PAIRS = 512, PAIRS // 4  # of the smaller ablations
SCALES = {"sigmoid": 10.0, "softmax": 1 / 0.07}  # what multiplies the cosines at first, in either paper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "quick", "full", "bias", "negatives" or "noise"."""
    arg = parse_arg(arg, quick=False, **dict.fromkeys(STUDIES, False))
    chosen = [name for name in STUDIES if arg[name]]
    if len(chosen) > 1:
        raise UserError(f"the config argument names {' and '.join(chosen)}, expected one study: leave one out.")
    config = siglip.get_config("b16" if arg.full else "mini")
    config.sweep_metric, config.sweep_x, config.sweep_series = "mean_r1", "batch_size", "loss.name"
    config.sweep_more = ("step_temp_bytes",)
    if not arg.full:
        miniature(config)
    (STUDIES[chosen[0]] if chosen else batches)(config)
    if arg.quick:
        quick(config)
    return config


def miniature(config: ConfigDict) -> None:
    """What all runs share; captions do not repeat within one."""
    config.data.num_objects, config.data.num_held_out = (2, 3), 500
    lengths(config, PAIRS)


def quick(config: ConfigDict) -> None:
    """A look at it in minutes: an eighth of the pairs, one seed, some batch sizes that still have 100 updates."""
    config.data.num_scenes, config.data.num_held_out = 2000, 400
    config.total_examples //= 8
    config.sweep = tuple(
        (name, changes)
        for name, changes in config.sweep
        if changes["seed"] == 0 and changes["batch_size"] in (32, 128, STUDY_SIZE)
    )


def lengths(config: ConfigDict, pairs: int) -> None:
    """A run by the pairs that it sees, whatever its batch size; evaluated at its end."""
    config.total_steps = config.eval_steps = config.checkpoint_steps = config.log_steps = None
    config.total_examples = pairs
    config.eval_percent = config.checkpoint_percent = 1.0
    config.log_percent = 0.05
    config.optimizer.warmup_steps, config.optimizer.warmup_percent = None, 0.1


def run(loss: str, batch_size: int, seed: int, **changes) -> dict:
    """Overrides of one run, with the two rules that go with the batch size.

    The learning rate grows with the root of the batch size, as the noise of Adam's updates asks for (Malladi et al.
    2022), from 1e-3 at 256. The bias begins at minus the logarithm of the batch size, the log-odds of a positive: what
    -10 is at 32,768.
    """
    overrides = {
        "loss.name": loss,
        "batch_size": batch_size,
        "seed": seed,
        "optimizer.learning_rate": 1e-3 * math.sqrt(batch_size / 256),
        "init.scale": SCALES[loss],
        "init.bias": -math.log(batch_size),
    }
    return overrides | {key.replace("__", "."): value for key, value in changes.items()}


def batches(config: ConfigDict) -> None:
    """Both losses at all batch sizes."""
    config.sweep = tuple(
        (f"{loss}-{size}-seed-{seed}", run(loss, size, seed)) for seed in range(3) for size in SIZES for loss in SCALES
    )


def full(config: ConfigDict) -> None:
    """The grid of the paper's size, at its learning rate and bias; embedded in parts where the batch is large."""
    lengths(config, 3_000_000_000)
    config.sweep = tuple(
        (
            f"{loss}-{size}",
            {
                "loss.name": loss,
                "batch_size": size,
                "init.scale": SCALES[loss],
                "embed_micro_batch": min(size, 4096),
            },
        )
        for size in FULL_SIZES
        for loss in SCALES
    )


def bias(config: ConfigDict) -> None:
    """Where the bias begins, and whether there is one."""
    config.sweep_x, config.total_examples = None, STUDY_PAIRS
    config.sweep = tuple(
        (f"bias{value}-seed-{seed}", run("sigmoid", STUDY_SIZE, seed, init__bias=value))
        for seed in range(3)
        for value in (-10.0, -math.log(STUDY_SIZE), 0.0, None)
    )


def negatives(config: ConfigDict) -> None:
    """Which negatives of an image count, and how many: random, the hardest or the easiest ones."""
    config.sweep_x, config.sweep_series = "loss.negatives", "loss.negatives_by"
    config.total_examples = STUDY_PAIRS
    every = STUDY_SIZE - 1
    chosen = [("random", every), *((by, number) for by in ("random", "hard", "easy") for number in (4, 16, 64))]
    config.sweep = tuple(
        (
            f"{by}-{number}-seed-{seed}",
            run("sigmoid", STUDY_SIZE, seed, loss__negatives=number, loss__negatives_by=by),
        )
        for seed in range(3)
        for by, number in chosen
    )


def noise(config: ConfigDict) -> None:
    """A share of the images, of the texts or of the pairs is spoilt in training."""
    config.sweep_x, config.sweep_series = "data.noise_share", "loss.name,data.noise"
    config.total_examples = STUDY_PAIRS
    chosen = [("", 0.0), *((kind, share) for kind in ("images", "texts", "pairs") for share in (0.25, 0.5))]
    config.sweep = tuple(
        (
            f"{loss}-{kind or 'clean'}-{share}-seed-{seed}",
            run(loss, STUDY_SIZE, seed, data__noise=kind, data__noise_share=share),
        )
        for seed in range(3)
        for kind, share in chosen
        for loss in SCALES
    )


STUDIES = {"full": full, "bias": bias, "negatives": negatives, "noise": noise}
