"""What a run must provide: the Task protocol. A config names its task by import path, so adding one touches no list."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.config.base import task_class
from train_jax.core.metrics import Metrics
from train_jax.data.pipeline import Source
from train_jax.parallel.sharding import Spec


class Blueprint(NamedTuple):
    """What a run computes, in shapes: made from the config alone, without weights, without data, nothing allocated.

    Attributes:
      task: its `trainable`, `sharding_rules`, `normalizer` and `loss` are used.
      model: as `init` returns it, its arrays `jax.ShapeDtypeStruct` (nnx.eval_shape).
      example: shapes and dtypes of a training example, as `train_source()[i]` is.
      programs: what an evaluation computes: name -> (function, arguments), called as `function(model, *arguments)`;
        arguments are shapes with the shardings they have.
    """

    task: "Task"
    model: nnx.Module
    example: Mapping[str, jax.ShapeDtypeStruct]
    programs: Mapping[str, tuple[Callable, tuple]]


@runtime_checkable
class Task(Protocol):
    """A model, its data and its loss; everything the loop does not know.

    A task is constructed as `Class(config, mesh)` with the validated config; the constructor checks whatever can be
    checked without computing (files, vocabularies, patterns) and raises UserError.

    Beside the methods below a task may have
      check_workdir(workdir): called by every process before data are prepared or the model is read, in training and in
        evaluation; refuses a workdir whose run was made of other weights than the config's;
      start(workdir): called once before training, to put files of its own there;
      validation_metrics: names of all that `validate` measures, a tuple of str; with it a misspelt `best_metric` is
        found before anything is prepared, without it at the first evaluation;
      trainable_paths() -> paths of the parameters that train, told without data; with it a pattern of the optimizer
        that matches none is found before data are prepared, without it after;
      train_records() -> what `train_source` prepares, of its length and fingerprint, opened without the model: the data
        of a complete run are compared by it, without it by `train_source`;
      reported_data() -> str: fingerprint of what `evaluate` measures on by default; eval.json notes it, and a complete
        run is compared by it too;
      export(model, workdir): called once at the end of training with the chosen model, by every process;
      default_split: the split of `evaluate` when none is asked for;
      single_split: True where `evaluate` has nothing to choose from, and --split is refused;
      model_keys: patterns of the config keys that make the model, which an evaluation of a run may not change;
      describe(model) -> str: lines for the start-up report;
      parameter_counts(model) -> {path: number}: how many parameters an array stands for, where that is not its size
        (packed or quantised ones);
      describe_batch(batch) -> str: a training batch as a person reads it (train.py --print_batch);
      blueprint(config, mesh) -> Blueprint: a static or class method, for the plan command (train_jax/plan/programs.py);
      companions() -> {name: config}: runs that are trained in `workdir/name` before the evaluation, which gets
        their results as `companions={name: results}`.
    """

    harmless_keys: Sequence[str]
    """Patterns of this task's config keys that do not change the mathematics (see resume.check_resume)."""

    @staticmethod
    def defaults() -> ConfigDict:
        """The task's own config keys with their default values, beside the runtime's."""
        ...

    def init(self) -> nnx.Module:
        """The model at the start of training, weights loaded and adapters attached; a function of the config."""
        ...

    def trainable(self) -> str | None:
        """Pattern of the parameter paths that train; all others are frozen: no gradient, no optimizer state.

        None: nothing trains, as in a baseline that is only measured; the run is its evaluation (evaluate_only.py).
        """
        ...

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """(pattern, spec) pairs for every parameter, see sharding.shardings."""
        ...

    def train_source(self) -> Source:
        """Random access to training examples of fixed shapes."""
        ...

    def normalizer(self, batch: dict[str, jax.Array]) -> jax.Array:
        """What the summed loss of a whole batch [A, b, ...] is divided by (the supervised tokens, say): a scalar.

        It depends on the batch alone, so gradients of micro-batches add up to the gradient of the whole batch.
        """
        ...

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, Metrics]:
        """Summed loss of one micro-batch [b, ...] and its metrics as sums and counts.

        Args:
          model: parameters in place.
          batch: rows on the leading axis; beside what the source gives, state.ROW and state.STEP, int32 [b]: the
            row's number in the global batch, and the step's.
          keys: one key an example, a function of (seed, step, row), for dropout and noise. Whatever is random must
            come from these (or of what rows have in common from state.step_key), so that a batch may be cut into any
            micro-batches, on any number of processes and devices.
        """
        ...

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Cheap evaluation in the course of training; its metrics choose the best checkpoint."""
        ...

    def evaluate(self, model: nnx.Module, workdir: Path, split: str | None = None) -> dict[str, Any]:
        """The reported evaluation: writes predictions and pictures into `workdir`, returns what `eval.json` holds."""
        ...


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
    """The task of a config."""
    return task_class(config.task)(config, mesh)


def check_workdir(task: Task, workdir: Path) -> None:
    """Lets the task refuse a workdir of other weights.

    Raises:
      UserError: the task's own.
    """
    getattr(task, "check_workdir", lambda workdir: None)(workdir)
