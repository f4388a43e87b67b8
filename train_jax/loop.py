"""The one training loop: `fit(config, workdir)` trains and evaluates, `evaluate(config, workdir)` evaluates again.

Read `fit` first: it is the order in which things happen. The step itself is in step/train_state.py, what a run holds
and saves in run_state.py, the model and its data in the task. A workdir holds config.json, metrics.jsonl, eval.json,
checkpoints/, tensorboard/, and what the task adds.
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
from train_jax.config.durations import Plan
from train_jax.config.resume_check import check_single, look
from train_jax.config.validate import validate
from train_jax.core import files, metrics, row_sharding
from train_jax.core.errors import RunStopped
from train_jax.evaluate import evaluate, load_model, print_results, resolve, write_results
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.report.plots import plot_curves
from train_jax.report.reporter import Reporter
from train_jax.report.startup import startup_report
from train_jax.run_state import Session, training_batches
from train_jax.step import train_state, train_step
from train_jax.system.interrupt import Interrupt
from train_jax.system.memory import reported_peak, step_memory
from train_jax.task import check_workdir, make_task

__all__ = ["describe_batch", "evaluate", "fit", "load_model"]


def fit(config: ConfigDict, workdir: str | Path, progress: str = "auto", began: float | None = None) -> dict[str, Any]:
    """Trains as `config` says, resuming what the workdir holds, then evaluates; returns what `eval.json` holds.

    Args:
      config: see config.base_config.
      workdir: folder of the run; made if missing.
      progress: "auto", "bar", "plain" or "none", see reporting.Reporter.
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
    check_single(config, workdir)
    earlier = look(workdir, config)
    if earlier and earlier.results is not None:
        complete.check(config, workdir)
    for note in earlier.notes if earlier else ():
        _say(note)
    if earlier and earlier.results is not None:
        return earlier.results
    mesh = sharding.make_mesh(config.mesh)
    with row_sharding.over(mesh):
        return _fit(config, workdir, mesh, progress, began)


def _fit(config: ConfigDict, workdir: Path, mesh: Mesh, progress: str, began: float) -> dict[str, Any]:
    """The run itself, of a config that can run."""
    task = make_task(config, mesh)
    check_workdir(task, workdir)
    measured = getattr(task, "validation_metrics", None)
    if measured is not None:
        check_metric(config.best_metric, measured)
    if task.trainable() is None:
        return evaluate_only.fit(config, workdir, task, mesh, began)
    trainable_paths = getattr(task, "trainable_paths", None)
    if trainable_paths is not None:
        optimizers.check(config.optimizer, trainable_paths())
    files.make_folder(workdir)
    source = task.train_source()
    plan = Plan.of(config, len(source))
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode)
    try:
        run = Run(Session(config, workdir, mesh, task, plan, checkpoints, source, began))
        if jax.process_index() == 0:
            files.write_atomically(workdir / "config.json", to_json(config))
            getattr(task, "start", lambda workdir: None)(workdir)
        with Interrupt() as interrupt:
            run.train(progress, interrupt)
            if interrupt.requested(agree=True):  # during the last evaluation of the training, whose state is saved
                checkpoints.wait()
                interrupt.leave(checkpoints.latest_step())
        return run.finish(progress)
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


class Run:
    """The loop around a session: steps, reports, evaluations, and what follows from them."""

    def __init__(self, session: Session):
        self.session, self.config, self.plan = session, session.config, session.plan
        self.task, self.workdir = session.task, session.workdir
        self._faults_told = int(session.state.guard.total)

    def train(self, progress: str, interrupt: Interrupt) -> None:
        """Runs the steps that are left."""
        session, plan = self.session, self.plan
        if session.over:
            return
        batches = session.pipeline.iterate(session.step)
        if jax.process_index() == 0:  # of a shorter run that is being extended
            (self.workdir / "eval.json").unlink(missing_ok=True)
        reporter = Reporter(self.workdir, plan.total, session.step, self.config.batch_size, progress)
        try:
            step_fn, zeros = self._compile(reporter)
            batch_spec = sharding.batch_sharding(session.mesh).spec
            synchronous = jax.process_count() > 1 and jax.default_backend() == "cpu"  # gloo hangs when steps queue up
            totals, waited = _copy(zeros), 0.0
            while not session.over:
                batch = sharding.to_global(next(batches), session.mesh, batch_spec)
                waited += batches.wait_seconds
                session.state, totals = step_fn(session.state, totals, session.bundle.frozen, batch)
                session.step += 1
                if synchronous:
                    jax.block_until_ready(totals)
                last = session.step == plan.total
                interrupted = interrupt.requested(session.step % plan.log == 0)
                if session.step % plan.log == 0 or last or interrupted:
                    self._log(reporter, totals, waited)
                    totals, waited = _copy(zeros), 0.0
                reporter.tick(session.step)
                with reporter.paused():
                    if session.step % plan.eval == 0 or last:
                        self._validate(reporter)
                    elif session.step % plan.checkpoint == 0 or interrupted:
                        self._save(reporter)
                if interrupted:
                    session.checkpoints.wait()
                    interrupt.leave(session.checkpoints.latest_step())
        finally:
            batches.close()
            reporter.close()

    def _compile(self, reporter: Reporter):
        """The compiled step and its zero totals; prints the start-up report."""
        session, bundle, mesh = self.session, self.session.bundle, self.session.mesh
        batch = sharding.to_global(session.pipeline.batch_at(0), mesh, sharding.batch_sharding(mesh).spec)
        traced, totals = train_step.trace(
            self.config, self.task, mesh, bundle, session.optimizer, session.schedule, session.state, batch
        )
        zeros = jax.device_put(metrics.zeros_like(totals), sharding.replicated(mesh))
        began = time.perf_counter()
        compiled = traced.lower().compile()
        memory = step_memory(compiled)
        session.step_temp_bytes = None if memory is None else memory.temp
        model = bundle.model(session.state.params)
        counts = getattr(self.task, "parameter_counts", lambda model: {})(model)
        reporter.say(startup_report(session.state.params, bundle.frozen, session.state.opt_state, compiled, counts))
        for note in bundle.notes:
            reporter.say(note)
        describe = getattr(self.task, "describe", None)
        if describe is not None:
            reporter.say(describe(model))
        resumed = f", resuming at step {session.step}" if session.step else ""
        reporter.say(f"compiled in {time.perf_counter() - began:.1f} s; {self.plan.total} steps{resumed}")
        return compiled, zeros

    def _log(self, reporter: Reporter, totals, waited: float) -> None:
        """Reads the metrics of the interval from the device, and looks at the guard."""
        session = self.session
        means = metrics.means(totals)
        guard = jax.device_get(session.state.guard)
        means["data_wait_seconds"] = waited
        scale = session.state.loss_scale
        if scale is not None:
            means |= {"loss_scale": float(scale.value), "loss_scale_skips": int(guard.scale_skips)}
        if getattr(session.source, "bad_rows", None):
            means["bad_rows"] = len(session.source.bad_rows)
        if guard.total:
            means["bad_steps"] = int(guard.total)
        reporter.write(session.step, means)
        if guard.total > self._faults_told:
            reporter.say(
                f"{int(guard.total) - self._faults_told} update(s) up to step {session.step} had a non-finite loss or "
                f"gradient and were skipped"
            )
            self._faults_told = int(guard.total)
        self._check_guard()

    def _check_guard(self) -> train_state.Guard:
        """The guard, read from the device; ends the run if it has latched."""
        guard = jax.device_get(self.session.state.guard)
        if guard.stopped:
            self._stop(int(guard.first_bad), int(guard.in_a_row))
        return guard

    def _stop(self, first_bad: int, in_a_row: int) -> None:
        """Writes the first bad batch out and gives up; checkpoints stay as they are."""
        process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""  # each has rows of its own
        file = self.workdir / f"bad_batch_{first_bad}{process}.npz"
        np.savez(file, **self.session.pipeline.batch_at(first_bad))
        kept = self.session.checkpoints.latest_step()
        kept = "no checkpoint was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
        raise RunStopped(
            f"the loss or its gradient was non-finite in {in_a_row} update(s) in a row from step {first_bad} on "
            f"(max_bad_steps={self.config.max_bad_steps}); {kept} and the batch is in {file}: look at it; or lower "
            f"optimizer.learning_rate or set optimizer.grad_clip_norm in another --workdir."
        )

    def _validate(self, reporter: Reporter) -> None:
        """Evaluates, ranks, saves."""
        self._check_guard()
        session = self.session
        results = self.task.validate(session.bundle.model(session.parameters()))
        reporter.write_validation(session.step, results)
        session.rank(results)
        if session.stopped_early:
            reporter.say(
                f"{self.config.best_metric} has not improved in {self.config.patience} evaluations: stopping at step "
                f"{session.step}."
            )
        self._save(reporter, results)

    def _save(self, reporter: Reporter, results: dict[str, float] | None = None) -> None:
        """Saves the state, unless its guard is not clean."""
        guard = self._check_guard()
        if guard.in_a_row:
            if self.session.step == self.plan.total:
                self._stop(int(guard.first_bad), int(guard.in_a_row))
            step = self.session.step
            reporter.say(f"step {step} is not saved: the last {int(guard.in_a_row)} update(s) were non-finite")
            return
        self.session.save(results)

    def finish(self, progress: str) -> dict[str, Any]:
        """Runs the task's companions, evaluates the chosen checkpoint, writes results and curves."""
        session = self.session
        check = getattr(session.source, "check", None)
        if check is not None:
            check()
        session.checkpoints.wait()
        step = resolve(session.checkpoints, "best" if self.config.load_best_at_end else "latest")
        item = "ema" if self.config.ema_decay is not None else "params"
        trained = session.checkpoints.restore_params(step, session.state.params, item)
        model = session.bundle.model(trained)
        session.state = None  # moments are not needed any more; their memory is
        getattr(self.task, "export", lambda model, workdir: None)(model, self.workdir)
        companions = {}
        for name, companion in getattr(self.task, "companions", dict)().items():
            _say(f"companion run {name} in {self.workdir / name}")
            companion_began = time.perf_counter()
            companions[name] = fit(companion, self.workdir / name, progress, companion_began)
            # What earlier processes spent on it is part of this run too, and is recorded there alone.
            here = time.perf_counter() - companion_began
            session.earlier_seconds += max(companions[name]["seconds"] - here, 0.0)
        options = {"companions": companions} if companions else {}
        results = {"step": step, "trainable_parameters": sum(leaf.size for leaf in trained.values())}
        results |= self.task.evaluate(model, self.workdir, **options) | complete.of_results(self.task)
        if session.step_temp_bytes is not None:
            results["step_temp_bytes"] = session.step_temp_bytes
        results |= {"peak_memory_bytes": reported_peak(), "seconds": session.seconds, "finished": True}
        write_results(self.workdir, results)
        if jax.process_index() == 0:
            plot_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
            print_results(results)
            print(
                f"{self.workdir}: {results['seconds']:.0f} s wall time, peak memory "
                f"{results['peak_memory_bytes'] / 2**30:.2f} GiB; see eval.json, curves.png and the pictures there."
            )
        return results


def _say(text: str) -> None:
    """Tells a person something, once however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)
