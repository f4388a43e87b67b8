"""The training loop: `fit(config, workdir)` trains and evaluates, `evaluate(config, workdir)` evaluates a finished run.

Read `fit` first, then `Trainer.train`; both are in order of execution. step/train_step.py defines the step, which calls
the task's loss, and run_state.py defines the contents of a checkpoint. A workdir holds config.json, metrics.jsonl,
eval.json, checkpoints/, tensorboard/ and the task's own files.
"""

import time
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax import completed_run, evaluate_only
from train_jax.checkpoints.best_metric import check_metric
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config.base import to_json
from train_jax.config.durations import Durations, check_length
from train_jax.config.resume_check import inspect_workdir, refuse_sweep
from train_jax.config.validate import validate
from train_jax.core import files, metrics, row_sharding
from train_jax.core.data_source import DataSource
from train_jax.core.errors import RunStopped
from train_jax.core.metrics import Metrics
from train_jax.data.pipeline import training_batches
from train_jax.evaluate import evaluate, load_model, print_results, resolve, write_results
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.report.plots import plot_curves
from train_jax.report.reporter import Reporter
from train_jax.report.startup import startup_report
from train_jax.run_state import RunState
from train_jax.step import placement, train_state, train_step
from train_jax.step.compiled_steps import CompiledSteps
from train_jax.step.placement import PlacedModel
from train_jax.system.interrupt import Interrupt
from train_jax.system.memory import reported_peak
from train_jax.task import Task, make_task

__all__ = ["describe_batch", "evaluate", "fit", "load_model"]

T = TypeVar("T")


def fit(config: ConfigDict, workdir: str | Path, progress: str = "auto", began: float | None = None) -> dict[str, Any]:
    """Trains a model, resuming from the workdir's latest checkpoint if there is one, and evaluates it.

    Args:
      config: see config.base_config.
      workdir: folder of the run; created if missing.
      progress: "auto", "bar", "plain" or "none", see reporter.Reporter.
      began: time (`time.perf_counter`) from which this process counts the `seconds` of the results; None = now. A
        resumed run adds the seconds of its earlier processes.

    Returns:
      The contents of `eval.json`.

    Raises:
      UserError: before data are prepared or the model is loaded, if the config is invalid or a sweep, or the workdir
        cannot be created or belongs to another run; if the data of a complete run have changed; before data are
        prepared, if a pattern matches no parameter (for tasks that define `trainable_paths`); before anything is
        compiled, if the data or the model do not fit the config.
      RunStopped: too many non-finite updates in a row.
      SystemExit: after Ctrl-C or SIGTERM, once the state is saved; the status is 128 + signal.
    """
    began = time.perf_counter() if began is None else began
    validate(config)
    workdir = Path(workdir)
    refuse_sweep(config, workdir)
    existing = inspect_workdir(workdir, config)
    if existing is not None:
        if existing.results is not None:
            completed_run.check(config, workdir)
        for note in existing.notes:
            _print_once(note)
        if existing.results is not None:
            return existing.results
    mesh = sharding.make_mesh(config.mesh)
    with row_sharding.use_mesh(mesh):
        return _fit(config, workdir, mesh, progress, began)


def _fit(config: ConfigDict, workdir: Path, mesh: Mesh, progress: str, began: float) -> dict[str, Any]:
    """Runs a validated config."""
    task = make_task(config, mesh)
    task.check_workdir(workdir)
    if task.validation_metrics is not None:
        check_metric(config.best_metric, task.validation_metrics)
    if task.trainable() is None:
        return evaluate_only.fit(config, workdir, task, mesh, began)
    check_length(config)
    paths = task.trainable_paths()
    if paths is not None:
        optimizers.check(config.optimizer, paths)
    files.make_folder(workdir)
    source = task.train_source()
    durations = Durations.of(config, len(source))
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode)
    try:
        trainer = Trainer(config, workdir, mesh, task, source, durations, checkpoints, began)
        if jax.process_index() == 0:
            files.write_atomically(workdir / "config.json", to_json(config))
            task.start(workdir)
        with Interrupt() as interrupt:
            trainer.train(progress, interrupt)
            if interrupt.requested(agree=True):  # a signal during the last evaluation; the state is saved already
                checkpoints.wait()
                interrupt.leave(checkpoints.latest_step())
        return trainer.finish(progress)
    finally:
        checkpoints.close()


def describe_batch(config: ConfigDict) -> str:
    """Returns the task's description of the first training batch.

    Raises:
      UserError: the config is invalid.
    """
    validate(config)
    task = make_task(config, sharding.make_mesh(config.mesh))
    return task.describe_batch(training_batches(config, task.train_source(), num_steps=1).batch_at(0))


class Trainer:
    """Trains a task's model on a mesh: runs steps, logs metrics, evaluates and saves checkpoints."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        mesh: Mesh,
        task: Task,
        source: DataSource,
        durations: Durations,
        checkpoints: Checkpoints,
        began: float,
    ):
        """Builds the model and the train state and restores the latest checkpoint, if there is one.

        Args:
          config: validated.
          workdir: folder of the run.
          mesh: from `sharding.make_mesh`.
          task: defines the model and its loss.
          source: training examples.
          durations: of the run, in steps.
          checkpoints: of the run.
          began: time (`time.perf_counter`) from which `seconds` counts.

        Raises:
          UserError: the model, the optimizer or the mesh is invalid, or the checkpoint was trained on other data.
        """
        self.config, self.workdir, self.mesh, self.task = config, workdir, mesh, task
        self.durations, self.checkpoints, self._began = durations, checkpoints, began
        self.pipeline = training_batches(config, source, durations.total)
        self.model = placement.place(task.init_for_training(), task.trainable(), task.sharding_rules(), mesh)
        self.schedule = optimizers.make_schedule(config.optimizer, durations.total, durations.warmup)
        self.optimizer = optimizers.make_optimizer(config.optimizer, self.schedule, self.model.trainable)
        options = dict(ema=config.ema_decay is not None, float16=config.compute_dtype == "float16")
        self.state = RunState(placement.create_state(self.model, self.optimizer, mesh, **options))
        self.state.restore(checkpoints, self.pipeline.fingerprint, config.patience, workdir)
        self._reported_bad_steps = int(self.state.train.guard.total)

    @property
    def seconds(self) -> float:
        """Seconds of this process, plus those of each earlier process up to its last save."""
        return self.state.earlier_seconds + time.perf_counter() - self._began

    @property
    def done(self) -> bool:
        """Whether no step remains."""
        return self.state.step >= self.durations.total or self.state.stopped_early

    def train(self, progress: str, interrupt: Interrupt) -> None:
        """Runs the remaining steps."""
        state, durations = self.state, self.durations
        if self.done:
            return
        batches = self.pipeline.iterate(state.step)
        if jax.process_index() == 0:  # the results of a shorter run that is being extended
            (self.workdir / "eval.json").unlink(missing_ok=True)
        reporter = Reporter(self.workdir, durations.total, state.step, self.config.batch_size, progress)
        try:
            steps, zeros = self._compile(reporter)
            batch_spec = sharding.batch_sharding(self.mesh).spec
            synchronous = jax.process_count() > 1 and jax.default_backend() == "cpu"  # gloo hangs when steps queue up
            totals, wait_seconds = _copy(zeros), 0.0
            while not self.done:
                batch = sharding.to_global(next(batches), self.mesh, batch_spec)
                wait_seconds += batches.wait_seconds
                step = steps.for_batch(batch)
                state.train, totals = step(state.train, totals, self.model.frozen, batch)
                state.step += 1
                state.step_temp_bytes = steps.temp_bytes
                if synchronous:
                    jax.block_until_ready(totals)
                last = state.step == durations.total
                interrupted = interrupt.requested(state.step % durations.log == 0)
                if state.step % durations.log == 0 or last or interrupted:
                    self._log(reporter, totals, wait_seconds)
                    totals, wait_seconds = _copy(zeros), 0.0
                reporter.tick(state.step)
                with reporter.paused():
                    if state.step % durations.eval == 0 or last:
                        self._validate(reporter)
                    elif state.step % durations.checkpoint == 0 or interrupted:
                        self._save(reporter)
                if interrupted:
                    self.checkpoints.wait()
                    interrupt.leave(self.checkpoints.latest_step())
        finally:
            batches.close()
            reporter.close()

    def _compile(self, reporter: Reporter) -> tuple[CompiledSteps, Metrics]:
        """Returns the step, compiled for the first batch, and metrics of zero; prints the start-up report."""
        state, began = self.state.train, time.perf_counter()
        batch = self.pipeline.batch_at(self.state.step)
        batch = sharding.to_global(batch, self.mesh, sharding.batch_sharding(self.mesh).spec)
        names: list[str] = []

        def trace(model: PlacedModel, batch: dict[str, jax.Array]) -> jax.stages.Traced:
            traced, totals = train_step.trace(
                self.config,
                self.task.loss,
                self.task.normalizer,
                self.mesh,
                model,
                self.optimizer,
                self.schedule,
                self.state.train,
                batch,
            )
            names[:] = totals
            return traced

        steps = CompiledSteps(trace, self.model, reporter.say)
        compiled = steps.for_batch(batch)
        zeros = jax.device_put(metrics.zeros_like(names), sharding.replicated(self.mesh))
        model = self.model.model(state.params)
        counts = self.task.parameter_counts(model)
        reporter.say(startup_report(state.params, self.model.frozen, state.opt_state, compiled, counts))
        description = self.task.describe(model)
        for text in (*self.model.notes, *([] if description is None else [description])):
            reporter.say(text)
        resumed = f", resuming at step {self.state.step}" if self.state.step else ""
        reporter.say(f"compiled in {time.perf_counter() - began:.1f} s; {self.durations.total} steps{resumed}")
        return steps, zeros

    def _log(self, reporter: Reporter, totals: Metrics, wait_seconds: float) -> None:
        """Reads the metrics of the interval from the device, logs them and checks the guard."""
        train, step = self.state.train, self.state.step
        means = metrics.means(totals)
        guard = jax.device_get(train.guard)
        means["data_wait_seconds"] = wait_seconds
        if train.loss_scale is not None:
            means |= {"loss_scale": float(train.loss_scale.value), "loss_scale_skips": int(guard.scale_skips)}
        if self.pipeline.source.bad_rows:
            means["bad_rows"] = len(self.pipeline.source.bad_rows)
        if guard.total:
            means["bad_steps"] = int(guard.total)
        reporter.write(step, means)
        if guard.total > self._reported_bad_steps:
            reporter.say(
                f"{int(guard.total) - self._reported_bad_steps} update(s) up to step {step} had a non-finite loss or "
                f"gradient and were skipped"
            )
            self._reported_bad_steps = int(guard.total)
        self._check_guard()

    def _check_guard(self) -> train_state.Guard:
        """Reads the guard from the device; stops the run if it has latched."""
        guard = jax.device_get(self.state.train.guard)
        if guard.stopped:
            self._stop(int(guard.first_bad), int(guard.in_a_row))
        return guard

    def _stop(self, first_bad: int, in_a_row: int) -> NoReturn:
        """Writes the first bad batch to a file and raises RunStopped; checkpoints are not changed."""
        process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""  # each has its own rows
        file = self.workdir / f"bad_batch_{first_bad}{process}.npz"
        batch: dict[str, Any] = self.pipeline.batch_at(first_bad)
        np.savez(file, **batch)
        latest = self.checkpoints.latest_step()
        saved = "no checkpoint was saved yet" if latest is None else f"the checkpoint of step {latest} is kept"
        raise RunStopped(
            f"the loss or its gradient was non-finite in {in_a_row} update(s) in a row from step {first_bad} on "
            f"(max_bad_steps={self.config.max_bad_steps}); {saved} and the batch is in {file}: inspect it, or lower "
            f"optimizer.learning_rate or set optimizer.grad_clip_norm in another --workdir."
        )

    def _validate(self, reporter: Reporter) -> None:
        """Evaluates the model, ranks the result and saves a checkpoint."""
        self._check_guard()
        state, config = self.state, self.config
        results = self.task.validate(self.model.model(state.parameters(config.ema_decay)))
        reporter.write_validation(state.step, results)
        if config.best_metric is not None:
            state.rank(self.checkpoints.score(results), config.patience, state.step == self.durations.total)
        if state.stopped_early:
            reporter.say(
                f"{config.best_metric} has not improved in {config.patience} evaluations: stopping at step "
                f"{state.step}."
            )
        self._save(reporter, results)

    def _save(self, reporter: Reporter, results: dict[str, float] | None = None) -> None:
        """Saves the state unless its last update was bad, with the `results` of its evaluation if there was one."""
        guard, state = self._check_guard(), self.state
        if guard.in_a_row:
            if state.step == self.durations.total:
                self._stop(int(guard.first_bad), int(guard.in_a_row))
            reporter.say(f"step {state.step} is not saved: the last {int(guard.in_a_row)} update(s) were non-finite")
            return
        ema = None if state.train.ema is None else state.parameters(self.config.ema_decay)
        state.save(self.checkpoints, self.pipeline.fingerprint, self.seconds, ema, results)

    def finish(self, progress: str) -> dict[str, Any]:
        """Trains the control runs, evaluates the chosen checkpoint, and writes results and curves."""
        self.pipeline.source.check()
        self.checkpoints.wait()
        step = resolve(self.checkpoints, "best" if self.config.load_best_at_end else "latest")
        item = "ema" if self.config.ema_decay is not None else "params"
        trained = self.checkpoints.restore_params(step, self.state.train.params, item)
        model = self.model.model(trained)
        del self.state.train  # frees the memory of the optimizer state
        self.task.export(model, self.workdir)
        controls = self._control_runs(progress)
        results: dict[str, Any] = {"step": step, "trainable_parameters": sum(leaf.size for leaf in trained.values())}
        results |= self.task.evaluate(model, self.workdir, control_results=controls)
        results |= completed_run.data_entry(self.task.reported_data())
        if self.state.step_temp_bytes is not None:
            results["step_temp_bytes"] = self.state.step_temp_bytes
        results |= {"peak_memory_bytes": reported_peak(), "seconds": self.seconds, "finished": True}
        write_results(self.workdir, results)
        if jax.process_index() == 0:
            plot_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
            print_results(results)
            print(
                f"{self.workdir}: {results['seconds']:.0f} s wall time, peak memory "
                f"{results['peak_memory_bytes'] / 2**30:.2f} GiB; see eval.json, curves.png and the figures there."
            )
        return results

    def _control_runs(self, progress: str) -> dict[str, dict[str, Any]]:
        """Trains the task's control runs, each in a folder of its name; returns {name: results}."""
        results = {}
        for name, config in self.task.control_runs().items():
            _print_once(f"control run {name} in {self.workdir / name}")
            began = time.perf_counter()
            results[name] = fit(config, self.workdir / name, progress, began)
            # Time that earlier processes spent on a control run counts too; only its own results record it.
            here = time.perf_counter() - began
            self.state.earlier_seconds += max(results[name]["seconds"] - here, 0.0)
        return results


def _print_once(text: str) -> None:
    """Prints text in the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _copy(tree: T) -> T:
    return jax.tree.map(lambda x: x.copy(), tree)
