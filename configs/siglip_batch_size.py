"""Sigmoid against softmax loss over batch sizes: the ablation of Zhai et al. 2023 in miniature.

    python train.py --config=configs/siglip_batch_size.py

trains both losses at batch sizes 64, 512, 1024, 2048 and 4096 with three seeds, each on the same number of pairs, and
writes a table (sweep.md) and a figure (sweep.png): mean recall and memory of the step against the batch size. As in the
paper's SigLiT runs the image tower is locked and its features are computed once. An interrupted sweep goes on with the
same command. `:quick` does it with an eighth of the pairs, at 64 and 512, once.

The rate of each loss and batch size (`RATES`) is the best of `:grid`, the same four rates for all, by recall on scenes
kept for tuning, which are neither trained on nor held out; with the same --workdir its runs at those rates are those of
the first seed. `:memory` has the same losses over whole matrices of pairs beside these, to be planned:

    python -m train_jax.plan --config=configs/siglip_batch_size.py:memory --devices=1

`:full` is the grid of the paper's size, 512 to a million pairs on SigLIP B/16, on captions of yours (configs/siglip.py
tells how they are given). What it needs on 16 devices:

    python -m train_jax.plan --config=configs/siglip_batch_size.py:full --devices=16 --mesh=data=16

The paper's smaller ablations: `:bias` (of the sigmoid loss, at first: -10, 0 or none), `:negatives` (how many of an
image's negatives count, and which) and `:noise` (spoilt images, texts or pairs).
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import siglip
from train_jax.config import parse_arg, refuse_together

SIZES = (64, 512, 1024, 2048, 4096)  # from 32 to 512 neither loss moved by more than three points
FULL_SIZES = tuple(2**power for power in range(9, 21))  # 512 ... 1,048,576
PAIRS = 100 * SIZES[-1]  # seen in a run: 100 updates at the largest batch
WARM_UP = 50  # updates at least, however few there are: see `run`
GRID = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2)  # learning rates that are tried of every loss and batch size
# The best of them on the tuning split; of the sigmoid loss at 4,096 the second best: 1.35e-2 had 68.3 % with seed 0 and
# 51.2 % with seed 1.
RATES = {
    "sigmoid": {64: 4.5e-3, 512: 1.35e-2, 1024: 4.5e-3, 2048: 4.5e-3, 4096: 4.5e-3},
    "softmax": {64: 1.5e-3, 512: 1.35e-2, 1024: 1.35e-2, 2048: 1.35e-2, 4096: 1.35e-2},
}
STUDY_SIZE, STUDY_PAIRS = 512, PAIRS // 4  # of the smaller ablations
SCALES = {"sigmoid": 10.0, "softmax": 1 / 0.07}  # what multiplies the cosines at first, in either paper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "quick", "grid", "memory", "full", "bias", "negatives" or "noise"."""
    arg = parse_arg(arg, quick=False, **dict.fromkeys(STUDIES, False))
    refuse_together(arg, STUDIES, "leave one out")
    chosen = [name for name in STUDIES if arg[name]]
    config = siglip.get_config("b16" if arg.full else "mini")
    config.sweep.metric, config.sweep.x, config.sweep.series = "mean_r1", "batch_size", "loss.name"
    config.sweep.more = ("step_temp_bytes",)
    study = STUDIES[chosen[0]] if chosen else batches
    if not arg.full:
        pairs = STUDY_PAIRS if study in (bias, negatives, noise) else PAIRS
        miniature(config, pairs // 8 if arg.quick else pairs)
    study(config)
    if arg.quick:
        quick(config)
    return config


def miniature(config: ConfigDict, pairs: int) -> None:
    """What all runs of so many pairs share; captions do not repeat within one."""
    config.data.num_objects, config.data.num_held_out, config.data.num_tuning = (2, 3), 500, 500
    lengths(config, pairs)


def quick(config: ConfigDict) -> None:
    """A look at it in minutes: an eighth of the pairs, one seed, some batch sizes that still have 100 updates."""
    config.data.num_scenes, config.data.num_held_out, config.data.num_tuning = 2000, 400, 400
    config.sweep.runs = tuple(
        (name, changes)
        for name, changes in config.sweep.runs
        if changes["seed"] == 0 and changes["batch_size"] <= STUDY_SIZE
    )


def lengths(config: ConfigDict, pairs: int) -> None:
    """A run by the pairs that it sees, whatever its batch size; evaluated at its end."""
    config.total_steps = config.eval_steps = config.checkpoint_steps = config.log_steps = None
    config.total_examples = pairs
    config.eval_percent = config.checkpoint_percent = 1.0
    config.log_percent = 0.05
    config.optimizer.warmup_steps, config.optimizer.warmup_percent = None, 0.1


def run(
    config: ConfigDict, loss: str, batch_size: int, seed: int, rate: float | None = None, **changes
) -> dict[str, Any]:
    """Overrides of one run of `config`, with what goes with the batch size.

    At first all embeddings of a tower are nearly one vector, and an update moves the cosines of all pairs at once. The
    sigmoid loss sees the cosines themselves, not their differences alone as the softmax does: its gradient along that
    one direction is tens of times what tells pairs apart. Adam's first steps overshoot there unless the rate grows
    slowly, so the warm-up has `WARM_UP` updates, or half of those there are. The bias begins at minus the logarithm of
    the batch size, the log-odds of a positive: what -10 is at 32,768.
    """
    updates = config.total_examples // batch_size
    overrides = {
        "loss.name": loss,
        "batch_size": batch_size,
        "seed": seed,
        "optimizer.learning_rate": rate or RATES[loss][batch_size],
        "optimizer.warmup_steps": max(updates // 10, min(WARM_UP, updates // 2)),
        "init.scale": SCALES[loss],
        "init.bias": -math.log(batch_size),
    }
    return overrides | {key.replace("__", "."): value for key, value in changes.items()}


def named(config: ConfigDict, loss: str, batch_size: int, seed: int, rate: float) -> tuple[str, dict]:
    """A run of either the grid or the ablation: where they share a rate and a seed they share the run."""
    return f"{loss}-{batch_size}-{rate:g}-seed-{seed}", run(config, loss, batch_size, seed, rate)


def batches(config: ConfigDict) -> None:
    """Both losses at all batch sizes."""
    config.sweep.runs = tuple(
        named(config, loss, size, seed, RATES[loss][size]) for seed in range(3) for size in SIZES for loss in SCALES
    )


def grid(config: ConfigDict) -> None:
    """The same rates for each loss and batch size, judged on the tuning split."""
    config.sweep.metric, config.sweep.x = "tuning_mean_r1", "optimizer.learning_rate"
    config.sweep.series, config.sweep.more = "loss.name,batch_size", ()
    config.sweep.runs = tuple(
        named(config, loss, size, 0, rate) for size in reversed(SIZES) for loss in SCALES for rate in GRID
    )


def memory(config: ConfigDict) -> None:
    """A step of each loss, in chunks and over the whole matrix of pairs, at the paper's 32,768 too."""
    config.sweep.series = "loss.name,loss.full_matrix"
    config.sweep.runs = tuple(
        (f"{loss}-{size}-{'matrix' if full else 'chunks'}", run(config, loss, size, 0, GRID[0], loss__full_matrix=full))
        for size in (*SIZES, 32_768)
        for loss in SCALES
        for full in (False, True)
    )


def full(config: ConfigDict) -> None:
    """The grid of the paper's size, at its learning rate and bias; embedded in parts where the batch is large."""
    lengths(config, 3_000_000_000)
    config.sweep.runs = tuple(
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
    config.sweep.x = None
    config.sweep.runs = tuple(
        (f"bias{value}-seed-{seed}", run(config, "sigmoid", STUDY_SIZE, seed, init__bias=value))
        for seed in range(3)
        for value in (-10.0, -math.log(STUDY_SIZE), 0.0, None)
    )


def negatives(config: ConfigDict) -> None:
    """Which negatives of an image count, and how many: random, the hardest or the easiest ones."""
    config.sweep.x, config.sweep.series = "loss.negatives", "loss.negatives_by"
    every = STUDY_SIZE - 1
    chosen = [("random", every), *((by, number) for by in ("random", "hard", "easy") for number in (4, 16, 64))]
    config.sweep.runs = tuple(
        (
            f"{by}-{number}-seed-{seed}",
            run(config, "sigmoid", STUDY_SIZE, seed, loss__negatives=number, loss__negatives_by=by),
        )
        for seed in range(3)
        for by, number in chosen
    )


def noise(config: ConfigDict) -> None:
    """A share of the images, of the texts or of the pairs is spoilt in training."""
    config.sweep.x, config.sweep.series = "data.noise_share", "loss.name,data.noise"
    chosen = [("", 0.0), *((kind, share) for kind in ("images", "texts", "pairs") for share in (0.25, 0.5))]
    config.sweep.runs = tuple(
        (
            f"{loss}-{kind or 'clean'}-{share}-seed-{seed}",
            run(config, loss, STUDY_SIZE, seed, data__noise=kind, data__noise_share=share),
        )
        for seed in range(3)
        for kind, share in chosen
        for loss in SCALES
    )


STUDIES = {"grid": grid, "memory": memory, "full": full, "bias": bias, "negatives": negatives, "noise": noise}
