"""The state of a run under way: arrays, data position and patience, and how they are saved and restored."""

import math
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.checkpoints.manager import Checkpoints
from train_jax.config.durations import Plan
from train_jax.config.resume_check import check_data, gave_up
from train_jax.core import files
from train_jax.data.pipeline import Pipeline, Source
from train_jax.optim import optimizers
from train_jax.step import placement
from train_jax.step import train_state as state
from train_jax.task import Task


class Session:
    """The state of a run under way, and its way to and from disk."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        mesh: Mesh,
        task: Task,
        plan: Plan,
        checkpoints: Checkpoints,
        source: Source,
        began: float,
    ):
        """Builds model and state, and takes over the latest checkpoint; `began` is when `seconds` starts to count.

        Raises:
          UserError: the model, the optimizer or the mesh cannot be, or the checkpoint is of other data.
        """
        self.config, self.workdir, self.mesh, self.task, self.plan = config, workdir, mesh, task, plan
        self.checkpoints, self.source = checkpoints, source
        self._began, self.earlier_seconds = began, 0.0
        self.step_temp_bytes: int | None = None  # of the compiled step, on a device; None where that is not known
        self.pipeline = training_batches(config, source, plan.total)
        self.bundle = placement.build(task, mesh)
        self.schedule = optimizers.make_schedule(config.optimizer, plan.total, plan.warmup)
        self.optimizer = optimizers.make_optimizer(config.optimizer, self.schedule, self.bundle.trainable)
        self.state = placement.create_state(
            self.bundle,
            self.optimizer,
            mesh,
            ema=config.ema_decay is not None,
            float16=config.compute_dtype == "float16",
        )
        self.best_score, self.without_improvement, self.stopped_early = -math.inf, 0, False
        self.step = self._restore()

    @property
    def seconds(self) -> float:
        """Wall time of the run: of this process, and of earlier ones up to the last save of each."""
        return self.earlier_seconds + time.perf_counter() - self._began

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.plan.total or self.stopped_early

    def rank(self, results: dict[str, float]) -> None:
        """Takes an evaluation into account for patience.

        Raises:
          UserError: it does not measure `best_metric`.
        """
        patience = self.config.patience
        if self.config.best_metric is None:
            return
        score = self.checkpoints.score(results)
        if score > self.best_score:
            self.best_score, self.without_improvement = score, 0
        else:
            self.without_improvement += 1
        if patience is not None and self.without_improvement >= patience and self.step < self.plan.total:
            self.stopped_early = True

    def save(self, results: dict[str, float] | None = None) -> None:
        """Saves the state; `results` are those of an evaluation of it."""
        meta = {
            "step": self.step,
            "fingerprint": files.plain(self.pipeline.fingerprint),
            "best_value": self.best_score,
            "without_improvement": self.without_improvement,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "step_temp_bytes": self.step_temp_bytes,
            "versions": {"jax": jax.__version__},
        }
        ema = self.parameters() if self.state.ema is not None else None
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
        check_data(meta["fingerprint"], self.pipeline.fingerprint, self.workdir)
        found = self.checkpoints.restore(latest, self.state.params, self._rest(self.state))
        rest = found.opt_state
        self.state = state.TrainState(
            rest["step"], found.params, rest["optimizer"], rest["raw_ema"], rest["guard"], rest["loss_scale"]
        )
        self.best_score = -math.inf if meta["best_value"] is None else meta["best_value"]
        self.without_improvement = meta["without_improvement"]
        self.stopped_early = gave_up(meta, self.config.patience)
        self.earlier_seconds = meta.get("seconds", 0.0)
        self.step_temp_bytes = meta.get("step_temp_bytes")
        return latest

    def parameters(self) -> dict[str, jax.Array]:
        """The trainable parameters to evaluate: their moving average, if one is kept."""
        current = self.state
        if current.ema is None:
            return current.params
        debiased = jax.jit(state.debiased, static_argnums=1)
        return debiased(current.ema, self.config.ema_decay, current.updates, current.params)


def training_batches(config: ConfigDict, source: Source, num_steps: int) -> Pipeline:
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
