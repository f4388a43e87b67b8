"""The one training loop: `fit(config, workdir)` trains and evaluates, `evaluate(config, workdir)` evaluates again.

Read `fit` first: it is the order in which things happen. The step itself is in state.py, the model and its data in the
task. A workdir holds config.json, metrics.jsonl, eval.json, checkpoints/, tensorboard/, and what the task adds.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax import config as config_lib
from train_jax import files, metrics, model_state, optimizers, sharding, state
from train_jax.checkpoints import Checkpoints
from train_jax.errors import RunStopped, UserError
from train_jax.input import Pipeline
from train_jax.interrupt import Interrupt
from train_jax.memory import peak_memory_bytes
from train_jax.plots import plot_curves
from train_jax.reporting import Reporter
from train_jax.resume import check_resume
from train_jax.startup import startup_report
from train_jax.task import Task, make_task
from train_jax.validation import validate


def fit(config: ConfigDict, workdir: str | Path, progress: str = "auto") -> dict[str, Any]:
    """Trains as `config` says, resuming what the workdir holds, then evaluates; returns what `eval.json` holds.

    Args:
      config: see config.base_config.
      workdir: folder of the run; made if missing.
      progress: "auto", "bar", "plain" or "none", see reporting.Reporter.

    Raises:
      UserError: a config that cannot run, or a workdir of another run; before anything is compiled.
      RunStopped: too many non-finite updates in a row.
      SystemExit: Ctrl-C or SIGTERM, with status 128 + signal, after saving.
    """
    began = time.perf_counter()
    validate(config)
    workdir = Path(workdir)
    mesh = sharding.make_mesh(config.mesh)
    task = make_task(config, mesh)
    source = task.train_source()
    plan = Plan.of(config, len(source))
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode)
    try:
        if checkpoints.latest_step() is not None:
            for note in check_resume(_stored_config(workdir), config, len(source)):
                _say(note)
        done = _finished(workdir, checkpoints, plan, config.patience)
        if done is not None:
            steps = checkpoints.latest_step()
            _say(f"{workdir} is complete: {steps} steps trained and evaluated, see {workdir / 'eval.json'}.")
            return done
        run = Run(config, workdir, mesh, task, plan, checkpoints, source)
        if jax.process_index() == 0:
            files.write_atomically(workdir / "config.json", config_lib.to_json(config))
            getattr(task, "start", lambda workdir: None)(workdir)
        with Interrupt() as interrupt:
            run.train(progress, interrupt)
        return run.finish(progress, began)
    finally:
        checkpoints.close()


def evaluate(
    config: ConfigDict, workdir: str | Path, split: str | None = None, checkpoint: str | int = "best"
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run, or the model before training where the workdir has no `checkpoints/`.

    Args:
      config: the run's own, with changes that do not alter the model.
      split: data split; None is the task's own, whose results go to `eval.json` (another's to `eval-<split>.json`).
      checkpoint: "best" (the latest where none was ranked), "latest", or a step.

    Raises:
      UserError: a config that cannot run, or no such checkpoint.
    """
    began = time.perf_counter()
    validate(config)
    workdir = Path(workdir)
    task, model, step = _trained(config, workdir, checkpoint)
    workdir.mkdir(parents=True, exist_ok=True)
    results = {"step": step} | task.evaluate(model, workdir, split) | _costs(began)
    _write_results(workdir, results, split)
    return results


def load_model(config: ConfigDict, workdir: str | Path, checkpoint: str | int = "best") -> nnx.Module:
    """The model of a run, for use outside the loop; arguments and errors as of `evaluate`."""
    validate(config)
    return _trained(config, Path(workdir), checkpoint)[1]


def _trained(config: ConfigDict, workdir: Path, checkpoint: str | int) -> tuple[Task, nnx.Module, int]:
    """The task, its model with the parameters of a checkpoint, and the step of that (0: as it was before training)."""
    mesh = sharding.make_mesh(config.mesh)
    task = make_task(config, mesh)
    bundle = model_state.build(task, mesh)
    if not (workdir / "checkpoints").is_dir() and checkpoint == "best":
        return task, bundle.model(), 0
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode, read_only=True)
    try:
        step = _resolve(checkpoints, checkpoint)
        item = "ema" if config.ema_decay is not None else "params"
        return task, bundle.model(checkpoints.restore_params(step, bundle.trainable, item)), step
    finally:
        checkpoints.close()


def describe_batch(config: ConfigDict) -> str:
    """The first training batch as the task shows it to a person.

    Raises:
      UserError: a config that cannot run.
    """
    validate(config)
    task = make_task(config, sharding.make_mesh(config.mesh))
    return task.describe_batch(_pipeline(config, task.train_source(), num_steps=1).batch_at(0))


def _pipeline(config: ConfigDict, source, num_steps: int) -> Pipeline:
    """This process's share of the training batches."""
    return Pipeline(
        source,
        config.batch_size,
        config.micro_batch,
        seed=config.seed,
        num_steps=num_steps,
        threads=config.data.threads,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The run's durations in steps."""

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int

    @classmethod
    def of(cls, config: ConfigDict, epoch_examples: int) -> "Plan":
        def steps(prefix, **options):
            holder = config.optimizer if prefix == "warmup" else config
            return config_lib.steps(holder, prefix, config.batch_size, epoch_examples, **options)

        total = steps("total")
        if total < 1:
            raise UserError(
                "the run has 0 steps, expected at least one: lengthen config.total_steps (or its other units)"
            )
        log, eval_, checkpoint = (max(steps(name, total_steps=total), 1) for name in ("log", "eval", "checkpoint"))
        return cls(total, steps("warmup", total_steps=total, default=0), log, eval_, checkpoint)


class Run:
    """A run under way: everything between a checked config and its results."""

    def __init__(self, config, workdir: Path, mesh: Mesh, task: Task, plan: Plan, checkpoints: Checkpoints, source):
        self.config, self.workdir, self.mesh, self.task, self.plan = config, workdir, mesh, task, plan
        self.checkpoints, self.source = checkpoints, source
        self.pipeline = _pipeline(config, source, plan.total)
        self.bundle = model_state.build(task, mesh)
        self.schedule = optimizers.make_schedule(config.optimizer, plan.total, plan.warmup)
        self.optimizer = optimizers.make_optimizer(config.optimizer, self.schedule, self.bundle.trainable)
        self.state = model_state.create_state(
            self.bundle,
            self.optimizer,
            mesh,
            ema=config.ema_decay is not None,
            float16=config.compute_dtype == "float16",
        )
        self.best_value, self.without_improvement, self.stopped_early = None, 0, False
        self.faults_told = 0
        self.step = self._restore()

    # Training.

    def train(self, progress: str, interrupt: Interrupt) -> None:
        """Runs the steps that are left."""
        if self.step >= self.plan.total or self.stopped_early:
            return
        if jax.process_index() == 0:  # of a shorter run that is being extended
            (self.workdir / "eval.json").unlink(missing_ok=True)
        reporter = Reporter(self.workdir, self.plan.total, self.step, self.config.batch_size, progress)
        batches = self.pipeline.iterate(self.step)
        try:
            step_fn, totals = self._compile(reporter)
            batch_spec = sharding.batch_sharding(self.mesh).spec
            synchronous = jax.process_count() > 1 and jax.default_backend() == "cpu"  # gloo hangs when steps queue up
            zeros, waited = totals, 0.0
            totals = _copy(zeros)
            while self.step < self.plan.total and not self.stopped_early:
                batch = sharding.to_global(next(batches), self.mesh, batch_spec)
                waited += batches.wait_seconds
                self.state, totals = step_fn(self.state, totals, self.bundle.frozen, batch)
                self.step += 1
                if synchronous:
                    jax.block_until_ready(totals)
                last = self.step == self.plan.total
                interrupted = interrupt.requested(self.step % self.plan.log == 0)
                if self.step % self.plan.log == 0 or last or interrupted:
                    self._log(reporter, totals, waited)
                    totals, waited = _copy(zeros), 0.0
                reporter.tick(self.step)
                with reporter.paused():
                    if self.step % self.plan.eval == 0 or last:
                        self._validate(reporter)
                    elif self.step % self.plan.checkpoint == 0 or interrupted:
                        self._save(reporter)
                if interrupted:
                    self.checkpoints.wait()
                    interrupt.leave(self.checkpoints.latest_step())
        finally:
            batches.close()
            reporter.close()

    def _compile(self, reporter: Reporter):
        """The compiled step and its zero totals; prints the start-up report."""
        config, bundle = self.config, self.bundle
        step = state.make_train_step(
            bundle.merge,
            self.task.loss,
            self.task.normalizer,
            self.optimizer,
            self.schedule,
            seed=config.seed,
            ema_decay=config.ema_decay,
            max_bad_steps=config.max_bad_steps,
        )
        batch = sharding.to_global(self.pipeline.batch_at(0), self.mesh, sharding.batch_sharding(self.mesh).spec)

        def metric_names(params, frozen, batch):
            keys = state.row_keys(config.seed, self.state.step, self.pipeline.micro_batch)
            return self.task.loss(bundle.merge(params | frozen), jax.tree.map(lambda x: x[0], batch), keys)[1]

        names = jax.eval_shape(metric_names, self.state.params, bundle.frozen, batch)
        zeros = metrics.zeros_like([*names, "loss", "grad_norm", "learning_rate"])
        zeros = jax.device_put(zeros, sharding.replicated(self.mesh))
        began = time.perf_counter()
        places = jax.tree.map(lambda leaf: leaf.sharding, (self.state, zeros))
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
        compiled = jitted.lower(self.state, zeros, bundle.frozen, batch).compile()
        reporter.say(startup_report(self.state.params, bundle.frozen, self.state.opt_state, compiled))
        for note in bundle.notes:
            reporter.say(note)
        describe = getattr(self.task, "describe", None)
        if describe is not None:
            reporter.say(describe(bundle.model(self.state.params)))
        resumed = f", resuming at step {self.step}" if self.step else ""
        reporter.say(f"compiled in {time.perf_counter() - began:.1f} s; {self.plan.total} steps{resumed}")
        return compiled, zeros

    def _log(self, reporter: Reporter, totals, waited: float) -> None:
        """Reads the metrics of the interval from the device, and looks at the guard."""
        means = metrics.means(totals)
        guard = jax.device_get(self.state.guard)
        means["data_wait_seconds"] = waited
        if self.state.loss_scale is not None:
            means |= {"loss_scale": float(self.state.loss_scale.value), "loss_scale_skips": int(guard.scale_skips)}
        if getattr(self.source, "bad_rows", None):
            means["bad_rows"] = len(self.source.bad_rows)
        if guard.total:
            means["bad_steps"] = int(guard.total)
        reporter.write(self.step, means)
        if guard.total > self.faults_told:
            reporter.say(
                f"{int(guard.total) - self.faults_told} update(s) up to step {self.step} had a non-finite loss or "
                f"gradient and were skipped"
            )
            self.faults_told = int(guard.total)
        self._check_guard()

    def _check_guard(self) -> state.Guard:
        """The guard, read from the device; ends the run if it has latched."""
        guard = jax.device_get(self.state.guard)
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
            f"(max_bad_steps={self.config.max_bad_steps}); {kept} and the batch is in {file}: look at it, lower "
            f"optimizer.learning_rate, or set optimizer.grad_clip_norm."
        )

    def _validate(self, reporter: Reporter) -> None:
        """Evaluates, ranks, saves."""
        self._check_guard()
        results = self.task.validate(self.bundle.model(self._parameters()))
        reporter.write_validation(self.step, results)
        metric = self.config.best_metric
        if metric is not None:
            if metric not in results:
                raise UserError(
                    f"best_metric is {metric!r}, which the evaluation does not measure: it has {[*results]}."
                )
            value = float(results[metric]) * (1 if self.config.best_mode == "max" else -1)
            if math.isfinite(value) and (self.best_value is None or value > self.best_value):
                self.best_value, self.without_improvement = value, 0
            else:
                self.without_improvement += 1
        patience = self.config.patience
        if patience is not None and self.without_improvement >= patience and self.step < self.plan.total:
            self.stopped_early = True
            reporter.say(f"{metric} has not improved in {patience} evaluations: stopping at step {self.step}.")
        self._save(reporter, results)

    # Checkpoints.

    def _save(self, reporter: Reporter, results: dict[str, float] | None = None) -> None:
        """Saves the state, unless its guard is not clean."""
        guard = self._check_guard()
        if guard.in_a_row:
            reporter.say(f"step {self.step} is not saved: the last {int(guard.in_a_row)} update(s) were non-finite")
            return
        meta = {
            "step": self.step,
            "fingerprint": files.plain(self.pipeline.fingerprint),
            "best_value": self.best_value,
            "without_improvement": self.without_improvement,
            "stopped_early": self.stopped_early,
            "versions": {"jax": jax.__version__},
        }
        ema = self._parameters() if self.state.ema is not None else None
        self.checkpoints.save(self.step, self.state.params, self._rest(self.state), meta, results, ema)

    @staticmethod
    def _rest(state: state.TrainState) -> dict[str, Any]:
        """What a resumed run needs beside the parameters."""
        return {
            "optimizer": state.opt_state,
            "guard": state.guard,
            "loss_scale": state.loss_scale,
            "raw_ema": state.ema,
            "step": state.step,
        }

    def _restore(self) -> int:
        """Takes over the latest checkpoint, if there is one; returns its step.

        Raises:
          UserError: the data of the checkpoint is not the data of this run.
        """
        latest = self.checkpoints.latest_step()
        if latest is None:
            return 0
        meta = self.checkpoints.read_meta(latest)
        fingerprint = files.plain(self.pipeline.fingerprint)
        if meta["fingerprint"] != fingerprint:
            before = meta["fingerprint"]
            changed = {
                name: (before.get(name), value) for name, value in fingerprint.items() if before.get(name) != value
            }
            raise UserError(
                f"the training data is not that of the checkpoint in {self.workdir} (was, is: {changed}): restore the "
                "data, or choose another --workdir."
            )
        found = self.checkpoints.restore(latest, self.state.params, self._rest(self.state))
        rest = found.opt_state
        self.state = state.TrainState(
            rest["step"], found.params, rest["optimizer"], rest["raw_ema"], rest["guard"], rest["loss_scale"]
        )
        self.best_value, self.without_improvement = meta["best_value"], meta["without_improvement"]
        self.stopped_early = _gave_up(meta, self.config.patience)
        self.faults_told = int(self.state.guard.total)
        return latest

    def _parameters(self) -> dict[str, jax.Array]:
        """The trainable parameters to evaluate: their moving average, if one is kept."""
        current = self.state
        if current.ema is None:
            return current.params
        debiased = jax.jit(state.debiased, static_argnums=1)
        return debiased(current.ema, self.config.ema_decay, current.updates, current.params)

    # The end.

    def finish(self, progress: str, began: float) -> dict[str, Any]:
        """Runs the task's companions, evaluates the chosen checkpoint, writes results and curves."""
        self.checkpoints.wait()
        chosen = _resolve(self.checkpoints, "best" if self.config.load_best_at_end else "latest")
        item = "ema" if self.config.ema_decay is not None else "params"
        trained = self.checkpoints.restore_params(chosen, self.state.params, item)
        model = self.bundle.model(trained)
        self.state = None  # moments are not needed any more; their memory is
        companions = {}
        for name, companion in getattr(self.task, "companions", dict)().items():
            _say(f"companion run {name} in {self.workdir / name}")
            companions[name] = fit(companion, self.workdir / name, progress)
        options = {"companions": companions} if companions else {}
        results = {"step": chosen} | self.task.evaluate(model, self.workdir, **options) | _costs(began)
        _write_results(self.workdir, results)
        if jax.process_index() == 0:
            plot_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
            summary = {name: value for name, value in results.items() if isinstance(value, int | float)}
            print("\n".join(f"{name:>24}  {value:.6g}" for name, value in summary.items()))
            print(
                f"{self.workdir}: {results['seconds']:.0f} s wall time, peak memory "
                f"{results['peak_memory_bytes'] / 2**30:.2f} GiB; see eval.json, curves.png and the pictures there."
            )
        return results


def _say(text: str) -> None:
    """Tells a person something, once however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _stored_config(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir that holds checkpoints."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(
            f"{workdir} holds checkpoints but no config.json: restore the file, or choose another --workdir"
        )
    return config_lib.from_json(file.read_text(encoding="utf-8"))


def _finished(workdir: Path, checkpoints: Checkpoints, plan: Plan, patience: int | None) -> dict[str, Any] | None:
    """The results of a run that is complete, else None."""
    latest, file = checkpoints.latest_step(), workdir / "eval.json"
    if latest is None or not file.exists():
        return None
    if latest < plan.total and not _gave_up(checkpoints.read_meta(latest), patience):
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _gave_up(meta: dict[str, Any], patience: int | None) -> bool:
    """Whether the run of a checkpoint stopped early, and would again under this patience."""
    return meta["stopped_early"] and patience is not None and meta["without_improvement"] >= patience


def _resolve(checkpoints: Checkpoints, which: str | int) -> int:
    """A checkpoint's step; "best" falls back on the latest where no evaluation was ranked."""
    if which == "best" and checkpoints.best_step() is None:
        which = "latest"
    return checkpoints.resolve(which)


def _ignore(workdir: Path) -> None:
    """What a task without `start` does."""


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


def _costs(began: float) -> dict[str, Any]:
    """Wall time in seconds and peak memory in bytes: the fullest device's, or the process's where that is not told."""
    peak = peak_memory_bytes()
    return {"peak_memory_bytes": peak.device or peak.process, "seconds": time.perf_counter() - began}


def _write_results(workdir: Path, results: dict[str, Any], split: str | None = None) -> None:
    if jax.process_index() == 0:
        name = "eval.json" if split is None else f"eval-{split}.json"
        files.write_atomically(workdir / name, files.to_json(results, indent=2) + "\n")
