"""The runtime's config keys: length, optimizer, intervals, mesh, sweep and data pipeline of every run.

A task declares its own keys in the same form (`Task.keys`). Durations may be given in several units, of which one is
set: see `base.steps`.
"""

import dataclasses

from train_jax.core.config_keys import key, section
from train_jax.optim.optimizers import OPTIMIZERS, SCHEDULES
from train_jax.system.compilation_cache import DEFAULT_MB

UNITS = ("steps", "epochs", "examples", "percent")
DURATIONS = ("total", "log", "eval", "checkpoint", "optimizer.warmup")

_TOTAL = "length of the run; set exactly one unit"
_LOG = "interval between logged metrics; set exactly one unit (percent: 0 to 1 of the run)"
_EVAL = "interval between evaluations; likewise"
_CHECKPOINT = "interval between checkpoints; likewise"
_WARMUP = "length of the warm-up; at most one unit, none = no warm-up"


@dataclasses.dataclass(frozen=True)
class OptimizerKeys:
    """`config.optimizer`: see train_jax/optim/optimizers.py."""

    name: str = key("adamw", "optimizer", choices=OPTIMIZERS)
    learning_rate: float = key(1e-3, "peak learning rate, after the warm-up", minimum=0)
    schedule: str = key("constant", "of the learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int | None = key(None, _WARMUP)
    warmup_epochs: float | None = key(None, _WARMUP)
    warmup_examples: int | None = key(None, _WARMUP)
    warmup_percent: float | None = key(None, _WARMUP)
    warmup_constant: float | None = key(None, "learning rate during the warm-up; None = a ramp from 0", minimum=0)
    end_factor: float = key(0.0, "linear and cosine end at learning_rate * end_factor", minimum=0, maximum=1)
    rsqrt_timescale: float = key(10_000.0, "rsqrt: updates until the rate is learning_rate / sqrt(2)", above=0)
    b1: float = key(0.9, "decay of the first moment", minimum=0, below=1)
    b2: float = key(0.999, "decay of the second moment", minimum=0, below=1)
    eps: float = key(1e-8, "added to the denominator of Adam", minimum=0)
    momentum: float = key(0.0, "of sgd and adafactor; 0 = none", minimum=0, below=1)
    min_8bit_size: int = key(4096, "adamw_8bit: moments of smaller arrays stay in float32", minimum=1)
    weight_decay: float = key(0.0, "decoupled, multiplied by the step's learning rate as in AdamW", minimum=0)
    weight_decay_mask: str | None = key(None, "pattern of the paths that decay; None = matrices and embeddings")
    grad_clip_norm: float | None = key(None, "global norm over all trainable parameters; None = no clipping")
    rates: tuple = key(
        (), "((pattern, factor) or (pattern, factor, warmup_steps), ...): multiplies the rate of matching paths"
    )


@dataclasses.dataclass(frozen=True)
class MeshKeys:
    """`config.mesh`: devices along each axis; -1 = all that the others leave. `data` and `fsdp` split the batch."""

    data: int = key(-1, "devices that share the batch")
    fsdp: int = key(1, "devices that share the batch and the parameters")
    tensor: int = key(1, "devices that share each layer's width")


@dataclasses.dataclass(frozen=True)
class SweepKeys:
    """`config.sweep`: several runs in place of one (train_jax/sweep/run.py)."""

    runs: tuple = key((), "((name, {dotted key: value}), ...); each run has a folder of its name in the workdir")
    metric: str | None = key(None, "number of eval.json to compare the runs by; None = best_metric, else loss")
    x: str | None = key(None, "numeric config key or number of eval.json: the plot's x; None = one bar a run")
    series: str | None = key(None, "config key, or keys joined by commas, that distinguishes the plot's lines")
    more: tuple = key((), "further numbers of eval.json: a column of the table and a panel of the plot each")
    curves: tuple = key((), "lists of [x, y] in eval.json: a panel each, with a line for every group of runs")


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """`config.data`: how rows are read; a task adds which."""

    workers: int = key(0, "processes that read; 0 = threads of this process, faster unless decoding is slow", minimum=0)
    threads: int = key(2, "threads that read batches ahead; 0 = none", minimum=0)
    on_error: str = key("skip", "skip: a bad row is logged and gets weight 0", choices=("skip", "raise"))
    max_bad_fraction: float = key(0.01, "share of bad rows above which the run stops", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class RunKeys:
    """The keys of every run, beside its task's."""

    task: str | None = key(None, "import path of the task, package.module:Class")
    seed: int = key(0, "of initialisation, shuffling, dropout and noise", minimum=0)
    total_steps: int | None = key(None, _TOTAL)
    total_epochs: float | None = key(None, _TOTAL)
    total_examples: int | None = key(None, _TOTAL)
    batch_size: int = key(32, "examples per update, over all devices", minimum=1)
    micro_batch: int | None = key(
        None, "examples computed at once, over all devices; None = all", minimum=1, resume_safe=True
    )
    compute_dtype: str = key("float32", "float16 has dynamic loss scaling", choices=("float32", "bfloat16", "float16"))
    optimizer: OptimizerKeys = section(OptimizerKeys)
    ema_decay: float | None = key(
        None, "of an average of the trainable parameters, per update; None = none", minimum=0, below=1
    )
    log_steps: int | None = key(None, _LOG, resume_safe=True)
    log_epochs: float | None = key(None, _LOG, resume_safe=True)
    log_examples: int | None = key(None, _LOG, resume_safe=True)
    log_percent: float | None = key(None, _LOG, resume_safe=True)
    eval_steps: int | None = key(None, _EVAL, resume_safe=True)
    eval_epochs: float | None = key(None, _EVAL, resume_safe=True)
    eval_examples: int | None = key(None, _EVAL, resume_safe=True)
    eval_percent: float | None = key(None, _EVAL, resume_safe=True)
    checkpoint_steps: int | None = key(None, _CHECKPOINT, resume_safe=True)
    checkpoint_epochs: float | None = key(None, _CHECKPOINT, resume_safe=True)
    checkpoint_examples: int | None = key(None, _CHECKPOINT, resume_safe=True)
    checkpoint_percent: float | None = key(None, _CHECKPOINT, resume_safe=True)
    best_metric: str | None = key(
        None, "number of an evaluation that chooses the best checkpoint; None = keep the latest"
    )
    best_mode: str = key("max", "whether a larger or a smaller best_metric is better", choices=("max", "min"))
    load_best_at_end: bool = key(False, "report the best checkpoint instead of the last", resume_safe=True)
    patience: int | None = key(
        None, "evaluations in a row without improvement that end the run; None = never", minimum=1, resume_safe=True
    )
    max_bad_steps: int = key(
        1, "updates in a row with a non-finite loss or gradient that stop the run", minimum=1, resume_safe=True
    )
    compilation_cache_mb: int = key(
        DEFAULT_MB,
        "limit of the folder of compiled programs, shared by all runs of this machine, in MB; 0 = keep none",
        minimum=0,
        resume_safe=True,
    )
    mesh: MeshKeys = section(MeshKeys, resume_safe=True)
    sweep: SweepKeys = section(SweepKeys)
    data: DataKeys = section(DataKeys, resume_safe=True)
