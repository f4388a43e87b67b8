"""What a run must provide: `Task`, an abstract base class. A config names its task by import path."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.config.base import task_class
from train_jax.core.config_keys import config_dict
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
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


class Task(abc.ABC):
    """A model, its data and its loss; everything the loop does not know.

    A task is constructed as `Class(config, mesh)` with the validated config; the constructor checks whatever can be
    checked without computing (files, vocabularies, patterns) and raises UserError. The abstract methods are what a run
    needs; every other one is a hook with a default.

    Attributes:
      config, mesh: of the run.
    """

    keys: type | None = None
    """Dataclass of the task's own config keys, beside the runtime's (train_jax/core/config_keys.py)."""

    resume_safe_keys: Sequence[str] = ()
    """Patterns of further keys that a resumed run may change, where `defaults` returns some that are not declared."""

    architecture_keys: Sequence[str] = ()
    """Patterns of further keys that shape the model and that an evaluation may not change, likewise."""

    validation_metrics: Sequence[str] | None = None
    """Names of all that `validate` measures: with them a misspelt `best_metric` is found before anything is prepared.
    None: at the first evaluation."""

    default_split: str | None = None
    """The data split that `evaluate` reports when none is asked for."""

    has_splits: bool = True
    """False where `evaluate` has nothing to choose from, and --split is refused."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh

    # What every task defines.

    @abc.abstractmethod
    def init(self) -> nnx.Module:
        """The model at the start of training, weights loaded and adapters attached; a function of the config."""

    def init_for_training(self) -> nnx.Module:
        """Returns the model that `loss` reads, before training: by default `init()`.

        A task adds the frozen arrays here that its loss reads and its evaluation does not.
        """
        return self.init()

    @abc.abstractmethod
    def trainable(self) -> str | None:
        """Pattern of the parameter paths that train; all others are frozen: no gradient, no optimizer state.

        None: nothing trains, as in a baseline that is only measured; the run is its evaluation (evaluate_only.py).
        """

    @abc.abstractmethod
    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """(pattern, spec) pairs for every parameter, see sharding.shardings."""

    @abc.abstractmethod
    def train_source(self) -> DataSource:
        """Random access to training examples of fixed shapes."""

    @abc.abstractmethod
    def normalizer(self, batch: dict[str, jax.Array]) -> jax.Array:
        """What the summed loss of a whole batch [A, b, ...] is divided by (the supervised tokens, say): a scalar.

        It depends on the batch alone, so gradients of micro-batches add up to the gradient of the whole batch.
        """

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the loss of one micro-batch [b, ...], summed over its rows, and its metrics as sums and counts.

        Args:
          model: parameters in place.
          batch: rows on the leading axis; beside what the source gives, randomness.ROW and randomness.STEP, int32 [b]:
            the row's number in the global batch, and the step's.
          keys: one key an example, a function of (seed, step, row), for dropout and noise. Whatever is random must
            come from these (or of what rows have in common from randomness.step_key), so that a batch may be cut into
            any micro-batches, on any number of processes and devices.
        """

    @abc.abstractmethod
    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Cheap evaluation in the course of training; its metrics choose the best checkpoint."""

    @abc.abstractmethod
    def evaluate(
        self,
        model: nnx.Module,
        workdir: Path,
        split: str | None = None,
        control_results: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The reported evaluation: writes predictions and pictures into `workdir`, returns what `eval.json` holds.

        Args:
          model: of the checkpoint to report.
          workdir: of the run.
          split: of the data; None is `default_split`.
          control_results: {name: results} of `control_runs`, of a run that has some.
        """

    # Hooks, in the order in which a run calls them.

    @classmethod
    def defaults(cls) -> ConfigDict:
        """The task's own config keys with their default values: by default those of `keys`."""
        return ConfigDict() if cls.keys is None else config_dict(cls.keys)

    def check_workdir(self, workdir: Path) -> None:
        """Refuses a workdir whose run was made of other weights than the config's, with a UserError.

        Called by every process before data are prepared or the model is read, in training and in evaluation.
        """

    def trainable_paths(self) -> Sequence[str] | None:
        """Paths of the parameters that train, told without data; None if they are not known then.

        With it a pattern of the optimizer that matches none is found before data are prepared.
        """

    def start(self, workdir: Path) -> None:
        """Puts files of its own into a workdir; called once, by process 0, before training."""

    def train_records(self) -> DataSource:
        """What `train_source` prepares, of its length and fingerprint, opened without the model if that can be.

        The data of a complete run are compared by it.
        """
        return self.train_source()

    def reported_data(self) -> str | None:
        """Fingerprint of what `evaluate` measures on by default, noted in eval.json; None if it has none."""

    def describe(self, model: nnx.Module) -> str | None:
        """Lines for the start-up report."""

    def parameter_counts(self, model: nnx.Module) -> dict[str, int]:
        """{path: number} where an array stands for another number of parameters than its size: packed, quantised."""
        return {}

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """A training batch as a person reads it (train.py --print_batch): of each array its shape, by default."""
        return "\n".join(f"{name}: {values.dtype} {list(values.shape)}" for name, values in batch.items())

    def export(self, model: nnx.Module, workdir: Path) -> None:
        """Writes the chosen model in other formats; called once at the end of training, by every process."""

    def control_runs(self) -> dict[str, ConfigDict]:
        """{name: config} of runs to compare with, trained in `workdir/name` before the evaluation."""
        return {}

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """The lines that predict.py prints for a run of this task.

        Args:
          config: of the run, with what the command line changes.
          workdir: of the run; loop.load_model has its model.
          flags: of predict.py, by name: images, prompts and so on.

        Raises:
          UserError: the task does not define it, or flags that it has no use for.
        """
        raise UserError(
            f"{config.task} does not predict, expected a task with that method: add it (see train_jax/task.py), or "
            "evaluate the run with eval.py"
        )

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Shapes of a run, for the plan command.

        Raises:
          UserError: the task does not define it.
        """
        raise UserError(
            f"{config.task} has no blueprint, expected one to plan by: add that method (see train_jax/task.py)"
        )


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
    """The task of a config."""
    return task_class(config.task)(config, mesh)
