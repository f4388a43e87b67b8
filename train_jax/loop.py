"""The one training loop: `fit(config, workdir)` trains and evaluates, `evaluate(config, workdir)` evaluates again.

Read `fit` first, then `Trainer.train`: they are the order in which things happen. The step is in step/train_step.py and
calls the loss of the task; what a checkpoint holds is in run_state.py. A workdir holds config.json, metrics.jsonl,
eval.json, checkpoints/, tensorboard/, and what the task adds.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax import complete, evaluate_only
from train_jax.checkpoints.best_metric import check_metric
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config.base import to_json
from train_jax.config.durations import Durations
from train_jax.config.resume_check import inspect_workdir, refuse_sweep
from train_jax.config.validate import validate
from train_jax.core import files, metrics, row_sharding
from train_jax.core.data_source import DataSource
from train_jax.core.errors import RunStopped
from train_jax.data.pipeline import training_batches
from train_jax.evaluate import evaluate, load_model, print_results, resolve, write_results
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.report.plots import plot_curves
from train_jax.report.reporter import Reporter
from train_jax.report.startup import startup_report
from train_jax.run_state import RunState
from train_jax.step import placement, train_state, train_step
from train_jax.system.interrupt import Interrupt
from train_jax.system.memory import reported_peak, step_memory
from train_jax.task import Task, make_task

__all__ = ["describe_batch", "evaluate", "fit", "load_model"]


def fit(config: ConfigDict, workdir: str | Path, progress: str = "auto", began: float | None = None) -> dict[str, Any]:
    """Trains as `config` says, resuming what the workdir holds, then evaluates; returns what `eval.json` holds.

    Args:
      config: see config.base_config.
      workdir: folder of the run; made if missing.
      progress: "auto", "bar", "plain" or "none", see reporter.Reporter.
      began: the time (of `time.perf_counter`) from which on the `seconds` of the results count, those of earlier
        processes of the same run beside; None = now.

    Raises:
      UserError: a config that cannot run or is a sweep, or a workdir of another run or that cannot be made, before data
        are prepared or the model is read; a complete run of other data; patterns that match no parameter, before data
        are prepared (where the task tells its parameters in time); data or a model that do not fit the config, before
        anything is compiled.
      RunStopped: too many non-finite updates in a row.
      SystemExit: Ctrl-C or SIGTERM, with status 128 + signal, after saving.
    """
    began = time.perf_counter() if began is None else began
    validate(config)
    workdir = Path(workdir)
    refuse_sweep(config, workdir)
    existing = inspect_workdir(workdir, config)
    if existing is not None:
        if existing.results is not None:
            complete.check(config, workdir)
        for note in existing.notes:
            _say(note)
        if existing.results is not None:
            return existing.results
    mesh = sharding.make_mesh(config.mesh)
    with row_sharding.over(mesh):
        return _fit(config, workdir, mesh, progress, began)


def _fit(config: ConfigDict, workdir: Path, mesh: Mesh, progress: str, began: float) -> dict[str, Any]:
    """The run itself, of a config that can run."""
    task = make_task(config, mesh)
    task.check_workdir(workdir)
    if task.validation_metrics is not None:
        check_metric(config.best_metric, task.validation_metrics)
    if task.trainable() is None:
        return evaluate_only.fit(config, workdir, task, mesh, began)
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
            if interrupt.requested(agree=True):  # during the last evaluation of the training, whose state is saved
                checkpoints.wait()
                interrupt.leave(checkpoints.latest_step())
        return trainer.finish(progress)
    finally:
        checkpoints.close()


def describe_batch(config: ConfigDict) -> str:
    """The first training batch as the task shows it to a person.

    Raises:
      UserError: a config that cannot run.
    """
    validate(config)
    task = make_task(config, sharding.make_mesh(config.mesh))
    return task.describe_batch(training_batches(config, task.train_source(), num_steps=1).batch_at(0))


class Trainer:
    """A run under way: a task's model on a mesh, its data, and its state; steps, reports, evaluates, saves."""

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
        """Builds model and state, and takes over the latest checkpoint; `began` is when `seconds` starts to count.

        Raises:
          UserError: the model, the optimizer or the mesh cannot be, or the checkpoint is of other data.
        """
        self.config, self.workdir, self.mesh, self.task = config, workdir, mesh, task
        self.durations, self.checkpoints, self._began = durations, checkpoints, began
        self.pipeline = training_batches(config, source, durations.total)
        self.model = placement.build(task, mesh, training=True)
        self.schedule = optimizers.make_schedule(config.optimizer, durations.total, durations.warmup)
        self.optimizer = optimizers.make_optimizer(config.optimizer, self.schedule, self.model.trainable)
        options = dict(ema=config.ema_decay is not None, float16=config.compute_dtype == "float16")
        self.state = RunState(placement.create_state(self.model, self.optimizer, mesh, **options))
        self.state.restore(checkpoints, self.pipeline.fingerprint, config.patience, workdir)
        self._faults_told = int(self.state.train.guard.total)

    @property
    def seconds(self) -> float:
        """Wall time of the run: of this process, and of earlier ones up to the last save of each."""
        return self.state.earlier_seconds + time.perf_counter() - self._began

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.state.step >= self.durations.total or self.state.stopped_early

    def train(self, progress: str, interrupt: Interrupt) -> None:
        """Runs the steps that are left."""
        state, durations = self.state, self.durations
        if self.over:
            return
        batches = self.pipeline.iterate(state.step)
        if jax.process_index() == 0:  # of a shorter run that is being extended
            (self.workdir / "eval.json").unlink(missing_ok=True)
        reporter = Reporter(self.workdir, durations.total, state.step, self.config.batch_size, progress)
        try:
            step, zeros = self._compile(reporter)
            batch_spec = sharding.batch_sharding(self.mesh).spec
            synchronous = jax.process_count() > 1 and jax.default_backend() == "cpu"  # gloo hangs when steps queue up
            totals, waited = _copy(zeros), 0.0
            while not self.over:
                batch = sharding.to_global(next(batches), self.mesh, batch_spec)
                waited += batches.wait_seconds
                state.train, totals = step(state.train, totals, self.model.frozen, batch)
                state.step += 1
                if synchronous:
                    jax.block_until_ready(totals)
                last = state.step == durations.total
                interrupted = interrupt.requested(state.step % durations.log == 0)
                if state.step % durations.log == 0 or last or interrupted:
                    self._log(reporter, totals, waited)
                    totals, waited = _copy(zeros), 0.0
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

    def _compile(self, reporter: Reporter):
        """The compiled step and its zero totals; prints the start-up report."""
        state = self.state.train
        batch = sharding.to_global(self.pipeline.batch_at(0), self.mesh, sharding.batch_sharding(self.mesh).spec)
        traced, totals = train_step.trace(
            self.config, self.task, self.mesh, self.model, self.optimizer, self.schedule, state, batch
        )
        zeros = jax.device_put(metrics.zeros_like(totals), sharding.replicated(self.mesh))
        began = time.perf_counter()
        compiled = traced.lower().compile()
        memory = step_memory(compiled)
        self.state.step_temp_bytes = None if memory is None else memory.temp
        model = self.model.model(state.params)
        counts = self.task.parameter_counts(model)
        reporter.say(startup_report(state.params, self.model.frozen, state.opt_state, compiled, counts))
        described = self.task.describe(model)
        for text in (*self.model.notes, *([] if described is None else [described])):
            reporter.say(text)
        resumed = f", resuming at step {self.state.step}" if self.state.step else ""
        reporter.say(f"compiled in {time.perf_counter() - began:.1f} s; {self.durations.total} steps{resumed}")
        return compiled, zeros

    def _log(self, reporter: Reporter, totals, waited: float) -> None:
        """Reads the metrics of the interval from the device, and looks at the guard."""
        train, step = self.state.train, self.state.step
        means = metrics.means(totals)
        guard = jax.device_get(train.guard)
        means["data_wait_seconds"] = waited
        if train.loss_scale is not None:
            means |= {"loss_scale": float(train.loss_scale.value), "loss_scale_skips": int(guard.scale_skips)}
        if self.pipeline.source.bad_rows:
            means["bad_rows"] = len(self.pipeline.source.bad_rows)
        if guard.total:
            means["bad_steps"] = int(guard.total)
        reporter.write(step, means)
        if guard.total > self._faults_told:
            reporter.say(
                f"{int(guard.total) - self._faults_told} update(s) up to step {step} had a non-finite loss or "
                f"gradient and were skipped"
            )
            self._faults_told = int(guard.total)
        self._check_guard()

    def _check_guard(self) -> train_state.Guard:
        """The guard, read from the device; ends the run if it has latched."""
        guard = jax.device_get(self.state.train.guard)
        if guard.stopped:
            self._stop(int(guard.first_bad), int(guard.in_a_row))
        return guard

    def _stop(self, first_bad: int, in_a_row: int) -> None:
        """Writes the first bad batch out and gives up; checkpoints stay as they are."""
        process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""  # each has rows of its own
        file = self.workdir / f"bad_batch_{first_bad}{process}.npz"
        np.savez(file, **self.pipeline.batch_at(first_bad))
        kept = self.checkpoints.latest_step()
        kept = "no checkpoint was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
        raise RunStopped(
            f"the loss or its gradient was non-finite in {in_a_row} update(s) in a row from step {first_bad} on "
            f"(max_bad_steps={self.config.max_bad_steps}); {kept} and the batch is in {file}: look at it; or lower "
            f"optimizer.learning_rate or set optimizer.grad_clip_norm in another --workdir."
        )

    def _validate(self, reporter: Reporter) -> None:
        """Evaluates, ranks, saves."""
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
        """Saves the state, unless its guard is not clean; `results` are those of an evaluation of it."""
        guard, state = self._check_guard(), self.state
        if guard.in_a_row:
            if state.step == self.durations.total:
                self._stop(int(guard.first_bad), int(guard.in_a_row))
            reporter.say(f"step {state.step} is not saved: the last {int(guard.in_a_row)} update(s) were non-finite")
            return
        ema = None if state.train.ema is None else state.parameters(self.config.ema_decay)
        state.save(self.checkpoints, self.pipeline.fingerprint, self.seconds, ema, results)

    def finish(self, progress: str) -> dict[str, Any]:
        """Trains the control runs, evaluates the chosen checkpoint, writes results and curves."""
        self.pipeline.source.check()
        self.checkpoints.wait()
        step = resolve(self.checkpoints, "best" if self.config.load_best_at_end else "latest")
        item = "ema" if self.config.ema_decay is not None else "params"
        trained = self.checkpoints.restore_params(step, self.state.train.params, item)
        model = self.model.model(trained)
        self.state.train = None  # moments are not needed any more; their memory is
        self.task.export(model, self.workdir)
        controls = self._control_runs(progress)
        results = {"step": step, "trainable_parameters": sum(leaf.size for leaf in trained.values())}
        results |= self.task.evaluate(model, self.workdir, control_results=controls)
        results |= complete.of_results(self.task)
        if self.state.step_temp_bytes is not None:
            results["step_temp_bytes"] = self.state.step_temp_bytes
        results |= {"peak_memory_bytes": reported_peak(), "seconds": self.seconds, "finished": True}
        write_results(self.workdir, results)
        if jax.process_index() == 0:
            plot_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
            print_results(results)
            print(
                f"{self.workdir}: {results['seconds']:.0f} s wall time, peak memory "
                f"{results['peak_memory_bytes'] / 2**30:.2f} GiB; see eval.json, curves.png and the pictures there."
            )
        return results

    def _control_runs(self, progress: str) -> dict[str, dict[str, Any]]:
        """{name: results} of the task's control runs, each in a folder of its name."""
        results = {}
        for name, config in self.task.control_runs().items():
            _say(f"control run {name} in {self.workdir / name}")
            began = time.perf_counter()
            results[name] = fit(config, self.workdir / name, progress, began)
            # What earlier processes spent on it is part of this run too, and is recorded there alone.
            here = time.perf_counter() - began
            self.state.earlier_seconds += max(results[name]["seconds"] - here, 0.0)
        return results


def _say(text: str) -> None:
    """Tells a person something, once however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)
