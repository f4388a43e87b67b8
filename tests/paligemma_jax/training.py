"""The training step of a VQA run outside the loop: the same model, batches, optimizer and step, without files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.data.records import Record
from paligemma_jax.tasks.vqa import consistency
from tests.paligemma_jax.mini import Rows, png, task_of
from tests.placed_model import placed_model
from train_jax.core import metrics, param_tree
from train_jax.data.pipeline import training_batches
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import placement, train_state, train_step
from train_jax.system.memory import StepMemory, step_memory

STEP = ("loss", "grad_norm", "learning_rate")  # metrics of every task's step
# Adam divides by |gradient| + eps: with a small eps the first steps would blow up the rounding of tiny gradients.
SMOOTH = {"optimizer.eps": 0.01, "optimizer.learning_rate": 0.05, "optimizer.schedule": "constant"}
SMOOTH |= {"optimizer.warmup_percent": None}


def measured(task) -> tuple[str, ...]:
    """Names of a step's metrics."""
    parts = consistency.parts(task.config.consistency)
    return ("good_rows", *(f"consistency_{part}" for part in parts), *STEP)


def long_answers(count: int = 64) -> Rows:
    """Rows, each with its own image, with answers of one to six words; one image cannot be decoded."""
    words = ("red", "cube", "small", "metal", "blue", "large")
    records = [
        Record(
            png(i), f"{i}.png", i, f"answer en What color is the {words[i % 6]} thing?", " ".join(words[: i % 6 + 1])
        )
        for i in range(count)
    ]
    records[3] = dataclasses.replace(records[3], image=b"no image")
    return Rows(records)


class Training:
    """The model, step and optimizer that train_jax.loop builds from a config, for given rows."""

    def __init__(self, options: dict, rows: Rows):
        self.options, self.task = options, task_of(options)
        task = self.task
        config, self.mesh = task.config, task.mesh
        source = task.processor.guarded(rows, task.processor.image_and_text, max_bad_fraction=1.0)
        self.batches = training_batches(config, source, num_steps=100)
        self.placed = placed_model(task)
        schedule = optimizers.make_schedule(config.optimizer, 100, 0)
        optimizer = optimizers.make_optimizer(config.optimizer, schedule, self.placed.trainable)
        self._step = train_step.make_train_step(
            self.placed.merge, task.loss, task.normalizer, optimizer, schedule, seed=config.seed
        )
        float16 = config.compute_dtype == "float16"
        self.state = placement.create_state(self.placed, optimizer, self.mesh, ema=False, float16=float16)
        self._compiled = None

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step on the host, [A, b, ...]."""
        return self.batches.batch_at(step)

    def run(self, steps: int) -> list[dict[str, float]]:
        """Runs a number of steps; returns the means of each."""
        history = []
        for step in range(steps):
            batch = sharding.to_global(self.batch(step), self.mesh, sharding.batch_sharding(self.mesh).spec)
            zeros = jax.device_put(metrics.zeros_like(measured(self.task)), sharding.replicated(self.mesh))
            if self._compiled is None:
                places = jax.tree.map(lambda leaf: leaf.sharding, (self.state, zeros))
                jitted = jax.jit(self._step, donate_argnums=(0, 1), out_shardings=places)
                self._compiled = jitted.lower(self.state, zeros, self.placed.frozen, batch).compile()
            self.state, totals = self._compiled(self.state, zeros, self.placed.frozen, batch)
            history.append(metrics.means(totals))
        return history

    def trained(self) -> dict[str, np.ndarray]:
        """The adapters by path, on the host."""
        return {path: np.asarray(leaf) for path, leaf in self.state.params.items()}


def planned_memory(task, graph: nnx.GraphDef, arrays: dict, micro: int, rows: int, pixels: int = 24) -> StepMemory:
    """Plans the memory of the step that train_jax.loop compiles (adapter gradients, AdamW, guard) without running.

    The model is given as structure and shapes; a batch has `micro` micro-batches of `rows` rows.
    """
    trained = {path: leaf for path, leaf in arrays.items() if "/lora_" in path}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in trained}
    schedule = optimizers.make_schedule(task.config.optimizer, 100, 0)
    optimizer = optimizers.make_optimizer(task.config.optimizer, schedule, trained)
    step = train_step.make_train_step(
        lambda arrays: param_tree.merge(graph, arrays), task.loss, task.normalizer, optimizer, schedule, seed=0
    )
    before = jax.eval_shape(lambda p: train_state.create(p, optimizer, ema=False, float16=False), trained)
    totals = jax.eval_shape(lambda: metrics.zeros_like(measured(task)))
    length = task.config.data.prefix_length + task.config.data.suffix_length
    shape = functools.partial(jax.ShapeDtypeStruct, (micro, rows, length))
    batch = {"tokens": shape(jnp.int32), "mask_ar": shape(jnp.int32)}
    batch |= {"mask_input": shape(bool), "mask_loss": shape(bool)}
    batch["weight"] = jax.ShapeDtypeStruct((micro, rows), jnp.float32)
    batch["image"] = jax.ShapeDtypeStruct((micro, rows, pixels, pixels, 3), jnp.uint8)
    return step_memory(jax.jit(step, donate_argnums=(0, 1)).lower(before, totals, frozen, batch).compile())


def largest_change(trained: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Returns the largest difference of any parameter."""
    return max(float(np.abs(trained[path] - other[path]).max()) for path in other)
