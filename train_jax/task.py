"""`Task`, the abstract base class of what a run trains. A config names its task by import path."""

import abc
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.config.base import task_class
from train_jax.config.configurable import Configurable
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments
from train_jax.core.metrics import Metrics
from train_jax.parallel.sharding import Spec


class Blueprint(NamedTuple):
    """The computations of a run in abstract arrays, made from the config alone without weights or data.

    Attributes:
      task: only its `trainable`, `sharding_rules`, `normalizer` and `loss` are called.
      model: the module that `init` returns, with `jax.ShapeDtypeStruct` for arrays (nnx.eval_shape).
      example: shapes and dtypes of a training example `train_source()[i]`.
      programs: the functions of an evaluation: name -> (function, arguments), called as `function(model, *arguments)`;
        arguments are shapes with shardings.
      model_flops: FLOPs that a training step of the whole batch needs, for model FLOPs utilisation; None if unknown.
    """

    task: "Task"
    model: nnx.Module
    example: Mapping[str, jax.ShapeDtypeStruct]
    programs: Mapping[str, tuple[Callable, tuple]]
    model_flops: float | None = None


class Task(Configurable, abc.ABC):
    """A model, its data and its loss.

    The runtime constructs a task as `Class(config, mesh)` with the validated config. The constructor should check what
    it can without computing (files, vocabularies, patterns) and raise UserError. A task implements the abstract
    methods; all other methods are hooks with a default. It declares its config keys as `Configurable` says, most simply
    in the dataclass `keys`.

    Attributes:
      config: the config of the run.
      mesh: the mesh of the run.
    """

    validation_metrics: Sequence[str] | None = None
    """Names of the metrics that `validate` returns, to reject a misspelt `best_metric` before data are prepared.
    With None it is rejected at the first evaluation."""

    default_split: str | None = None
    """The data split that `evaluate` uses for split None."""

    has_splits: bool = True
    """Whether `evaluate` accepts a split; if False, --split is refused."""

    op_classes: Sequence[tuple[str, str]] = ()
    """(class, pattern) pairs for the plan command, which sums estimated time by class: an operation is of the first
    class whose pattern is found in "file:function" of a source location that it was traced from."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh

    # Abstract methods, which every task defines.

    @abc.abstractmethod
    def init(self) -> nnx.Module:
        """Returns the model before training, with weights loaded and adapters attached; depends on the config alone."""

    def init_for_training(self) -> nnx.Module:
        """Returns the model that `loss` reads, before training: by default `init()`.

        A task adds the frozen arrays here that its loss reads and its evaluation does not.
        """
        return self.init()

    @abc.abstractmethod
    def trainable(self) -> str | None:
        """Returns the pattern of trainable parameter paths; all others are frozen, without gradient or optimizer state.

        None means that nothing trains, as in a baseline: the run is an evaluation (evaluate_only.py).
        """

    @abc.abstractmethod
    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """Returns (pattern, spec) pairs that cover every parameter, see sharding.shardings."""

    @abc.abstractmethod
    def train_source(self) -> DataSource:
        """Returns the training examples, which have fixed shapes."""

    @abc.abstractmethod
    def normalizer(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns the scalar that divides the summed loss of a batch [A, b, ...], such as its number of target tokens.

        It depends on the batch alone, so gradients of micro-batches add up to the gradient of the whole batch.
        """

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the loss of one micro-batch [b, ...], summed over its rows, and its metrics as sums and counts.

        Args:
          model: the model with its current parameters.
          batch: rows on the leading axis: the arrays of the source, and randomness.ROW and randomness.STEP, int32 [b],
            the row's index in the global batch and the step.
          keys: one key for each row, a function of (seed, step, row), for dropout and noise. All randomness must come
            from these keys, or from randomness.step_key if rows share it. Results then do not depend on the
            micro-batch or on the number of processes and devices.
        """

    @abc.abstractmethod
    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Returns the metrics of a cheap evaluation during training; `best_metric` is one of them."""

    @abc.abstractmethod
    def evaluate(
        self,
        model: nnx.Module,
        workdir: Path,
        split: str | None = None,
        control_results: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Evaluates the model for the report: writes predictions and figures, returns the contents of `eval.json`.

        Args:
          model: the model of the checkpoint to report.
          workdir: folder to write to.
          split: data split; None is `default_split`.
          control_results: {name: results} of the finished `control_runs`; None if there are none.
        """

    # Hooks, in the order in which a run calls them.

    def check_workdir(self, workdir: Path) -> None:
        """Raises UserError if the run in `workdir` started from other weights than the config's.

        Every process calls it, in training and evaluation, before data are prepared or the model is loaded.
        """

    def trainable_paths(self) -> Sequence[str] | None:
        """Returns the paths of the trainable parameters, or None if they are not known without data.

        With them, an optimizer pattern that matches none is refused before data are prepared.
        """

    def start(self, workdir: Path) -> None:
        """Writes the task's own files to the workdir; called once before training, by process 0."""

    def train_records(self) -> DataSource:
        """Returns a source with the length and fingerprint of `train_source`, if possible without loading the model.

        The runtime checks with it that the data of a complete run have not changed.
        """
        return self.train_source()

    def reported_data(self) -> str | None:
        """Returns a fingerprint of the data that `evaluate` uses by default, for eval.json; None if there is none."""

    def describe(self, model: nnx.Module) -> str | None:
        """Returns lines for the start-up report."""

    def parameter_counts(self, model: nnx.Module) -> dict[str, int]:
        """Returns {path: number of parameters} for arrays whose size differs from it, such as packed 4-bit weights."""
        return {}

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns a readable description of a training batch (train.py --print_batch), by default dtypes and shapes."""
        return "\n".join(f"{name}: {values.dtype} {list(values.shape)}" for name, values in batch.items())

    def export(self, model: nnx.Module, workdir: Path) -> None:
        """Writes the chosen model in other formats; called once after training, by every process."""

    def control_runs(self) -> dict[str, ConfigDict]:
        """Returns {name: config} of runs to compare with, which are trained in `workdir/name` before the evaluation."""
        return {}

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Returns the lines that predict.py prints for a run of this task.

        Args:
          config: of the run, with the command line's overrides.
          workdir: of the run; loop.load_model loads its model.
          flags: values of predict.py's flags by name.

        Raises:
          UserError: the task does not define this method, or does not accept one of the flags.
        """
        raise UserError(
            f"{config.task} does not define predict, which the predict command needs: define it (see "
            "train_jax/task.py), or evaluate the run with eval.py"
        )

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the computations of a run in abstract arrays, for the plan command.

        Raises:
          UserError: the task does not define this method.
        """
        raise UserError(
            f"{config.task} does not define blueprint, which the plan command needs: define it (see train_jax/task.py)"
        )


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
    """Returns the task of a config.

    Raises:
      UserError: the class is no `Task`, lacks a method, or defines one with other arguments; or as its constructor.
    """
    cls = task_class(config.task)
    if not issubclass(cls, Task):
        raise UserError(f"config.task={config.task!r} is no train_jax.task.Task, expected a subclass: derive it")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise UserError(f"{config.task} does not define {missing}, which every task needs: define what is missing")
    check_arguments(f"{config.task}(...)", cls, "config", "mesh")
    task = cls(config, mesh)
    for name, method in vars(Task).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            _, *arguments = inspect.signature(method).parameters
            check_arguments(f"{config.task}.{name}", getattr(task, name), *arguments)
    return task
