"""The state of a run, and how checkpoints store it: arrays, the step, and the counters of early stopping."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from train_jax.checkpoints.manager import Checkpoints
from train_jax.config.resume_check import check_data, is_early_stopped
from train_jax.core import files
from train_jax.step.train_state import Params, TrainState, debias_ema


@dataclasses.dataclass
class RunState:
    """The state of a run.

    Attributes:
      train: parameters, optimizer state, moving average and guard, on the devices.
      step: updates attempted so far.
      best_score: best `best_metric` so far, negated in mode "min", so that larger is better.
      without_improvement: consecutive evaluations since the best one.
      stopped_early: whether early stopping has ended the run.
      earlier_seconds: wall time of earlier processes of this run, up to the last save of each.
      step_temp_bytes: temporary memory of the compiled step on one device; None if unknown.
    """

    train: TrainState
    step: int = 0
    best_score: float = -math.inf
    without_improvement: int = 0
    stopped_early: bool = False
    earlier_seconds: float = 0.0
    step_temp_bytes: int | None = None

    def rank(self, score: float, patience: int | None, last: bool) -> None:
        """Updates the early-stopping counters; the evaluation after the last step never stops the run."""
        if score > self.best_score:
            self.best_score, self.without_improvement = score, 0
        else:
            self.without_improvement += 1
        self.stopped_early |= patience is not None and self.without_improvement >= patience and not last

    def parameters(self, ema_decay: float | None) -> Params:
        """Returns the trainable parameters to evaluate: their moving average if the run keeps one."""
        train = self.train
        if train.ema is None:
            return train.params
        return jax.jit(debias_ema, static_argnums=1)(train.ema, ema_decay, train.updates, train.params)

    def save(
        self,
        checkpoints: Checkpoints,
        fingerprint: dict[str, Any],
        seconds: float,
        ema: Params | None,
        results: dict[str, float] | None = None,
    ) -> None:
        """Saves the state as a checkpoint.

        Args:
          checkpoints: of the run.
          fingerprint: of the data; a resumed run must have the same.
          seconds: wall time of the run so far.
          ema: the debiased moving average, if the run keeps one.
          results: of the evaluation of this state, if there was one.
        """
        meta = {
            "step": self.step,
            "fingerprint": files.plain(fingerprint),
            "best_value": self.best_score,
            "without_improvement": self.without_improvement,
            "stopped_early": self.stopped_early,
            "seconds": seconds,
            "step_temp_bytes": self.step_temp_bytes,
            "versions": {"jax": jax.__version__},
        }
        checkpoints.save(self.step, self.train.params, _without_params(self.train), meta, results, ema)

    def restore(
        self, checkpoints: Checkpoints, fingerprint: dict[str, Any], patience: int | None, workdir: Path
    ) -> None:
        """Restores the latest checkpoint, if there is one.

        Raises:
          UserError: the checkpoint was trained on other data.
        """
        latest = checkpoints.latest_step()
        if latest is None:
            return
        meta = checkpoints.read_meta(latest)
        check_data(meta["fingerprint"], fingerprint, workdir)
        restored = checkpoints.restore(latest, self.train.params, _without_params(self.train))
        rest = restored.opt_state
        self.train = TrainState(
            rest["step"], restored.params, rest["optimizer"], rest["raw_ema"], rest["guard"], rest["loss_scale"]
        )
        self.step = latest
        self.best_score = -math.inf if meta["best_value"] is None else meta["best_value"]
        self.without_improvement = meta["without_improvement"]
        self.stopped_early = is_early_stopped(meta, patience)
        self.earlier_seconds = meta.get("seconds", 0.0)
        self.step_temp_bytes = meta.get("step_temp_bytes")


def _without_params(train: TrainState) -> dict[str, Any]:
    """Returns the fields of a train state other than the parameters, under their names in checkpoints."""
    return {
        "optimizer": train.opt_state,
        "guard": train.guard,
        "loss_scale": train.loss_scale,
        "raw_ema": train.ema,
        "step": train.step,
    }
