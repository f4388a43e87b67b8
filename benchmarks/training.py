"""A training run of train_jax without logging, evaluation and checkpoints, for timing."""

import time
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from train_jax.config.durations import Durations
from train_jax.core import metrics, row_sharding
from train_jax.core.data_source import Batch, DataSource
from train_jax.core.metrics import Metrics
from train_jax.data.pipeline import training_batches
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import placement, train_step
from train_jax.system.memory import step_memory
from train_jax.task import make_task


class TrainingRun:
    """The compiled step of a config, its state and its data.

    Attributes:
      config: of the run.
      task: defines the model and its loss.
      compile_seconds: time that the step took to compile.
      temp_bytes: temporary memory of the step, None if the backend does not report it.
      done: number of steps so far.
    """

    def __init__(self, config: ConfigDict, source: DataSource | None = None):
        """Compiles the step.

        Args:
          config: of the run.
          source: the examples; None: those of the task.
        """
        self.config, self.mesh, self.done = config, sharding.make_mesh(config.mesh), 0
        with row_sharding.use_mesh(self.mesh):
            self.task = make_task(config, self.mesh)
            self._source = self.task.train_source() if source is None else source
            self.placed = placement.place(
                self.task.init_for_training(), self.task.trainable(), self.task.sharding_rules(), self.mesh
            )
            steps = Durations.of(config, len(self._source))
            schedule = optimizers.make_schedule(config.optimizer, steps.total, steps.warmup)
            optimizer = optimizers.make_optimizer(config.optimizer, schedule, self.placed.trainable)
            options = dict(ema=config.ema_decay is not None, float16=config.compute_dtype == "float16")
            self.state = placement.create_state(self.placed, optimizer, self.mesh, **options)
            self._spec = sharding.batch_sharding(self.mesh).spec
            batch = self.batch(0)
            traced, totals = train_step.trace(
                config,
                self.task.loss,
                self.task.normalizer,
                self.mesh,
                self.placed,
                optimizer,
                schedule,
                self.state,
                batch,
            )
            began = time.perf_counter()
            self.step = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - began
        memory = step_memory(self.step)
        self.temp_bytes = None if memory is None else memory.temp
        self.totals = jax.device_put(metrics.zeros_like(totals), sharding.replicated(self.mesh))

    def _pipeline(self, num_steps: int):
        return training_batches(self.config, self._source, num_steps)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Returns the batch of a step on the mesh."""
        return sharding.to_global(self._pipeline(step + 1).batch_at(step), self.mesh, self._spec)

    def batches(self, steps: int) -> Iterator[Batch]:
        """Yields the batches of the next steps, without running them."""
        pipeline = self._pipeline(self.done + steps)
        return (pipeline.batch_at(self.done + step) for step in range(steps))

    def read(self, steps: int) -> None:
        """Makes the batches of the next steps as training does, without running them."""
        batches = self._pipeline(self.done + steps).iterate(self.done)
        for _ in range(steps):
            next(batches)
        batches.close()

    def take(self, batch: dict[str, jax.Array]) -> Metrics:
        """Runs a step on a batch and returns the metrics summed so far, on the host."""
        self.state, self.totals = self.step(self.state, self.totals, self.placed.frozen, batch)
        return jax.device_get(self.totals)

    def train(self, steps: int) -> None:
        """Runs more steps and waits for them; prefetching starts in it, as in train_jax.loop.Trainer.train."""
        batches = self._pipeline(self.done + steps).iterate(self.done)
        for _ in range(steps):
            batch = sharding.to_global(next(batches), self.mesh, self._spec)
            self.state, self.totals = self.step(self.state, self.totals, self.placed.frozen, batch)
        jax.block_until_ready(self.state)
        batches.close()
        self.done += steps

    def seconds_a_step(self, steps: int, rounds: int = 3) -> float:
        """Returns the median time of a step over some rounds of `steps` each, after one step of warm-up."""
        self.train(1)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            self.train(steps)
            seconds.append((time.perf_counter() - began) / steps)
        return float(np.median(seconds))

    def model(self) -> nnx.Module:
        """Returns a copy of the current model; later steps donate the original arrays."""
        return self.placed.model({path: leaf.copy() for path, leaf in self.state.params.items()})
