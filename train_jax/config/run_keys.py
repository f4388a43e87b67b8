"""The runtime's config keys: length, optimizer, intervals, mesh, sweep and data pipeline of every run.

A task declares its own keys in the same form (`Task.keys`). Durations may be given in several units, of which one is
set: see `base.steps`.
"""

import dataclasses

from train_jax.core.config_keys import key, section
from train_jax.optim.optimizers import OPTIMIZERS, SCHEDULES
from train_jax.system.compilation_cache import DEFAULT_MB

MAX_SEED = 2**32 - 1
"""Largest seed: jax.random.key reads 32 bits, so that larger ones would repeat smaller ones."""

MAX_EXAMPLES = 2**53 - 1
"""Largest number of examples of a duration, exact in float64; a long run reads more than 2^31."""

UNITS = ("steps", "epochs", "examples", "percent")
DURATIONS = ("total", "log", "eval", "checkpoint", "optimizer.warmup")

_TOTAL = "length of the run; exactly one of its units is set"
_UNIT = "exactly one of its units is set (percent: share of the run, 1 = all of it)"
_LOG = f"interval between logged metrics; {_UNIT}"
_EVAL = f"interval between evaluations; {_UNIT}"
_CHECKPOINT = f"interval between checkpoints; {_UNIT}"
_WARMUP = (
    "length of the warm-up; at most one of its units is set, without one there is none (percent: share of the run)"
)


@dataclasses.dataclass(frozen=True)
class OptimizerKeys:
    """`config.optimizer`: see train_jax/optim/optimizers.py."""

    name: str = key("adamw", "name of the optimizer", choices=OPTIMIZERS)
    learning_rate: float = key(1e-3, "peak learning rate, after the warm-up", minimum=0)
    schedule: str = key("constant", "shape of the learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int | None = key(None, _WARMUP, minimum=0)
    warmup_epochs: float | None = key(None, _WARMUP, minimum=0)
    warmup_examples: int | None = key(None, _WARMUP, minimum=0, maximum=MAX_EXAMPLES)
    warmup_percent: float | None = key(None, _WARMUP, minimum=0, maximum=1)
    warmup_constant: float | None = key(None, "learning rate during the warm-up; None = a ramp from 0", minimum=0)
    end_factor: float = key(
        0.0, "factor of learning_rate at which the schedules linear and cosine end", minimum=0, maximum=1
    )
    rsqrt_timescale: float = key(
        10_000.0, "number of updates after which the schedule rsqrt has fallen to learning_rate / sqrt(2)", above=0
    )
    b1: float = key(0.9, "decay of the first moment per update (adamw, adam, lion, adamw_8bit)", minimum=0, below=1)
    b2: float = key(0.999, "decay of the second moment per update (adamw, adam, lion, adamw_8bit)", minimum=0, below=1)
    eps: float = key(1e-8, "number added to the denominator of the Adam variants", minimum=0)
    momentum: float = key(0.0, "momentum of sgd and adafactor; 0 = none", minimum=0, below=1)
    min_8bit_size: int = key(4096, "adamw_8bit keeps the moments of arrays with fewer elements in float32", minimum=1)
    weight_decay: float = key(
        0.0, "decoupled weight decay; it is multiplied by the learning rate of the step, as in AdamW", minimum=0
    )
    weight_decay_mask: str | None = key(
        None, "pattern of the parameter paths that decay; None = matrices and embeddings"
    )
    grad_clip_norm: float | None = key(
        None, "largest global norm of the gradient of all trainable parameters; None = no clipping", above=0
    )
    rates: tuple = key(
        (),
        "entries (pattern, factor) or (pattern, factor, warmup_steps) that multiply the learning rate of parameters "
        "whose path matches",
    )


@dataclasses.dataclass(frozen=True)
class MeshKeys:
    """`config.mesh`: devices along each axis; -1 = all that the others leave. `data` and `fsdp` split the batch."""

    data: int = key(-1, "number of devices that share the batch; -1 = all that the other axes leave", minimum=-1)
    fsdp: int = key(
        1, "number of devices that share the batch and the parameters; -1 = all that the other axes leave", minimum=-1
    )
    tensor: int = key(
        1, "number of devices that share the width of each layer; -1 = all that the other axes leave", minimum=-1
    )


@dataclasses.dataclass(frozen=True)
class SweepKeys:
    """`config.sweep`: several runs in place of one (train_jax/sweep/run.py)."""

    runs: tuple = key(
        (), "entries (name, {dotted key: value}), one for each run, whose folder in the workdir has that name"
    )
    metric: str | None = key(
        None, "name of the number in eval.json that the runs are compared by; None = best_metric, or else loss"
    )
    x: str | None = key(
        None,
        "name of the numeric config key or the number in eval.json on the plot's x axis; None = one bar for each run",
    )
    series: str | None = key(
        None, "name of the config key that distinguishes the plot's lines, or several names joined by commas"
    )
    more: tuple[str, ...] = key(
        (), "names of further numbers in eval.json; each is a column of the table and a panel of the plot"
    )
    curves: tuple[str, ...] = key(
        (), "names of lists of [x, y] in eval.json; each is a panel with a line for every group of runs"
    )


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """`config.data`: how rows are read; a task adds which."""

    workers: int = key(
        0,
        "number of processes that read rows; 0 = threads of this process, which is faster unless decoding is slow",
        minimum=0,
    )
    threads: int = key(2, "number of threads that read batches ahead of the step; 0 = none", minimum=0)
    on_error: str = key(
        "skip",
        "what happens to a row that cannot be read: skip logs it and gives it weight 0",
        choices=("skip", "raise"),
    )
    max_bad_fraction: float = key(
        0.01, "largest share of rows that cannot be read; with more the run stops", minimum=0, maximum=1
    )


@dataclasses.dataclass(frozen=True)
class RunKeys:
    """The keys of every run, beside its task's."""

    task: str | None = key(None, "import path of the task, package.module:Class")
    seed: int = key(
        0, "seed of the initial parameters, the shuffling of the data, dropout and noise", minimum=0, maximum=MAX_SEED
    )
    total_steps: int | None = key(None, _TOTAL, minimum=0)
    total_epochs: float | None = key(None, _TOTAL, minimum=0)
    total_examples: int | None = key(None, _TOTAL, minimum=0, maximum=MAX_EXAMPLES)
    batch_size: int = key(32, "number of examples of an update, over all devices", minimum=1)
    micro_batch: int | None = key(
        None,
        "number of examples that are computed at once, over all devices; None = all of the batch",
        minimum=1,
        resume_safe=True,
    )
    compute_dtype: str = key(
        "float32",
        "dtype of the computation; float16 scales the loss dynamically",
        choices=("float32", "bfloat16", "float16"),
    )
    optimizer: OptimizerKeys = section(OptimizerKeys)
    ema_decay: float | None = key(
        None,
        "decay per update of an average of the trainable parameters, which is evaluated; None = no average",
        minimum=0,
        below=1,
    )
    log_steps: int | None = key(None, _LOG, minimum=1, resume_safe=True)
    log_epochs: float | None = key(None, _LOG, above=0, resume_safe=True)
    log_examples: int | None = key(None, _LOG, minimum=1, maximum=MAX_EXAMPLES, resume_safe=True)
    log_percent: float | None = key(None, _LOG, above=0, maximum=1, resume_safe=True)
    eval_steps: int | None = key(None, _EVAL, minimum=1, resume_safe=True)
    eval_epochs: float | None = key(None, _EVAL, above=0, resume_safe=True)
    eval_examples: int | None = key(None, _EVAL, minimum=1, maximum=MAX_EXAMPLES, resume_safe=True)
    eval_percent: float | None = key(None, _EVAL, above=0, maximum=1, resume_safe=True)
    checkpoint_steps: int | None = key(None, _CHECKPOINT, minimum=1, resume_safe=True)
    checkpoint_epochs: float | None = key(None, _CHECKPOINT, above=0, resume_safe=True)
    checkpoint_examples: int | None = key(None, _CHECKPOINT, minimum=1, maximum=MAX_EXAMPLES, resume_safe=True)
    checkpoint_percent: float | None = key(None, _CHECKPOINT, above=0, maximum=1, resume_safe=True)
    best_metric: str | None = key(
        None, "name of the number of an evaluation by which the best checkpoint is chosen; None = keep the latest"
    )
    best_mode: str = key("max", "whether a larger or a smaller best_metric is better", choices=("max", "min"))
    load_best_at_end: bool = key(
        False, "whether the final evaluation is of the best checkpoint instead of the last", resume_safe=True
    )
    patience: int | None = key(
        None,
        "number of evaluations in a row without improvement that end the run; None = no early stopping",
        minimum=1,
        resume_safe=True,
    )
    max_bad_steps: int = key(
        1,
        "number of updates in a row with a non-finite loss or gradient that stop the run",
        minimum=1,
        resume_safe=True,
    )
    compilation_cache_mb: int = key(
        DEFAULT_MB,
        "largest size in MB of the folder of compiled programs, which all runs on the machine share; 0 = keep none",
        minimum=0,
        resume_safe=True,
    )
    mesh: MeshKeys = section(MeshKeys, resume_safe=True)
    sweep: SweepKeys = section(SweepKeys)
    data: DataKeys = section(DataKeys, resume_safe=True)
