"""A small task for the runtime's tests: weighted regression by a network with a frozen tower and stacked layers.

Faults are injected by step: the examples that a run meets in `data.nan_steps` hold a NaN, those in `data.spike_steps` a
target so large that float16 gradients overflow, and reading those in `data.corrupt_steps` fails.
"""

import dataclasses
import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.data.records import BadRow, GuardedSource, Record, RecordSource
from train_jax.config.base import base_config
from train_jax.core.data_source import ExampleList
from train_jax.data.pipeline import Pipeline
from train_jax.parallel.sharding import replicated
from train_jax.task import Blueprint, Task

PATH = "tests.train_jax.toy_task:Toy"
FEATURES = 8


def record(index: int, weight: float) -> Record:
    """A row of the data: its index and its weight."""
    return Record(b"", f"row{index}.png", index, "", "", weight)


class Rows(RecordSource):
    """Random rows with weights over two orders of magnitude, like numbers of answer tokens."""

    def __init__(self, seed: int, length: int):
        self.seed, self.length = seed, length
        self.fingerprint = f"toy-{seed}-{length}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        return record(index, float(10 ** np.random.default_rng((self.seed, index, 1)).uniform(-1, 1)))

    def image_numbers(self) -> np.ndarray:
        return np.arange(self.length)


class Toy(Task):
    """See train_jax.task.Task."""

    resume_safe_keys = (r"data\.delay", r"data\.signal_.*", r"scores")

    @staticmethod
    def defaults() -> ConfigDict:
        return ConfigDict(
            {
                "total_steps": 8,
                "log_steps": 1,
                "eval_steps": 4,
                "checkpoint_steps": 4,
                "batch_size": 8,
                "optimizer": {"learning_rate": 0.01},
                "model": {"width": 8, "dropout": 0.2, "trainable": r"(layers|head)/.*"},
                "data": {
                    "seed": 0,
                    "examples": 1000,
                    "nan_steps": (),
                    "spike_steps": (),
                    "corrupt_steps": (),
                    "delay": 0.0,  # seconds a row takes to read
                    "signal_step": -1,  # this process receives a signal when a row of this step is read
                    "signal_number": int(signal.SIGTERM),
                },
                "scores": (),  # scores of the evaluations during training, in order
            }
        )

    def __init__(self, config: ConfigDict, mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, mesh
        self.validations = 0

    def init(self) -> nnx.Module:
        return Network(self.config.model.width, rngs=nnx.Rngs(self.config.seed))

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> Blueprint:
        task = cls(config, mesh)
        shapes = {"x": ((FEATURES,), jnp.float32), "y": ((), jnp.float32), "index": ((), jnp.int32)}
        example = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        example["weight"] = jax.ShapeDtypeStruct((), jnp.float32)
        held_out = jax.ShapeDtypeStruct((16, FEATURES), jnp.float32, sharding=replicated(mesh))
        programs = {"held-out outputs": (lambda model, x: model(x), (held_out,))}
        return Blueprint(task, nnx.eval_shape(task.init), example, programs)

    def trainable(self) -> str:
        return self.config.model.trainable

    def sharding_rules(self):
        return [
            ("tower/kernel", ("fsdp", "tensor")),
            ("layers/kernel", (None, "fsdp", "tensor")),
            ("head/kernel", ("tensor", None)),
            (".*", ()),
        ]

    def train_source(self) -> GuardedSource:
        data = self.config.data
        source = Rows(data.seed, data.examples)
        return GuardedSource(
            source,
            Prepare(
                data.seed,
                data.delay,
                self._indices(data.corrupt_steps),
                self._indices(data.nan_steps),
                self._indices(data.spike_steps),
                self._indices((data.signal_step,) if data.signal_step >= 0 else ()),
                data.signal_number,
            ),
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction,
            placeholder=record(0, 0.0),
        )

    def _indices(self, steps: tuple[int, ...]) -> frozenset[int]:
        """Returns the first row of the batches of the given steps."""
        if not steps:
            return frozenset()
        indices = ExampleList([{"index": np.int64(index)} for index in range(self.config.data.examples)])
        pipeline = Pipeline(indices, self.config.batch_size, seed=self.config.seed, num_steps=max(steps) + 1, threads=0)
        return frozenset(int(pipeline.batch_at(step)["index"][0, 0]) for step in steps)

    def normalizer(self, batch):
        return batch["weight"].sum()

    def loss(self, model, batch, keys):
        errors = self._errors(model, batch, keys)
        examples = jnp.float32(keys.shape[0])
        return errors.sum(), {"error": (errors.sum(), batch["weight"].sum()), "examples": (examples, jnp.float32(1))}

    def _errors(self, model, batch, keys=None):
        dtype = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}.get(self.config.compute_dtype, jnp.float32)
        output = model(batch["x"].astype(dtype), keys, self.config.model.dropout)
        return batch["weight"] * (output.astype(jnp.float32) - batch["y"]) ** 2

    def validate(self, model) -> dict[str, float]:
        scores, self.validations = self.config.scores, self.validations + 1
        results = {"loss": self._held_out_loss(model)}
        # Indexed by the evaluations of this process: a resumed run is passed the remaining scores.
        return results | ({"score": float(scores[min(self.validations, len(scores)) - 1])} if scores else {})

    def evaluate(self, model, workdir, split=None, control_results=None):
        return {"loss": self._held_out_loss(model), "examples": 16, "split": split or "held out"}

    def _held_out_loss(self, model) -> float:
        prepare = Prepare(self.config.data.seed + 1)
        rows = [prepare(record(index, 1.0)) for index in range(16)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch = jax.device_put(batch, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()))
        output = _outputs(*nnx.split(model), batch["x"])
        return float(jnp.mean((output - batch["y"]) ** 2))

    def describe_batch(self, batch) -> str:
        return f"{batch['index'].size} rows: {' '.join(map(str, batch['index'].ravel()))}"


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Makes arrays from a record, with the faults of the config."""

    seed: int
    delay: float = 0.0
    corrupt: frozenset[int] = frozenset()
    nans: frozenset[int] = frozenset()
    spikes: frozenset[int] = frozenset()
    signals: frozenset[int] = frozenset()
    signal_number: int = 0

    def __call__(self, row: Record) -> dict[str, np.ndarray]:
        index = row.image_index
        if row.weight and index in self.corrupt:
            raise BadRow(f"{row.image_name} is cut off")
        if index in self.signals:
            os.kill(os.getpid(), self.signal_number)
        time.sleep(self.delay)
        rng = np.random.default_rng((self.seed, index))
        x = rng.normal(size=FEATURES).astype(np.float32)
        y = np.float32(np.tanh(x[0] - x[1]))
        if index in self.nans:
            x[0] = np.nan
        if index in self.spikes:
            y = np.float32(5e4)
        return {"x": x, "y": y, "index": np.int64(index)}


class Linear(nnx.Module):
    """A linear layer with kernel [*stacked, inputs, outputs] and bias [*stacked, outputs], in the input's dtype."""

    def __init__(self, *shape: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) / shape[-2] ** 0.5)
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1])))

    def weights(self, dtype) -> tuple[jax.Array, jax.Array]:
        return self.kernel[...].astype(dtype), self.bias[...].astype(dtype)


def affine(x, weights):
    kernel, bias = weights
    return x @ kernel + bias[None]


class Network(nnx.Module):
    """tower (to be frozen) -> dropout -> two residual layers, stacked and scanned -> head."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.tower = Linear(FEATURES, width, rngs=rngs)
        self.layers = Linear(2, width, width, rngs=rngs)
        self.head = Linear(width, 1, rngs=rngs)

    def __call__(self, x, keys=None, dropout=0.0):
        """x [b, FEATURES] -> [b] in x's dtype; with keys, one for each row, dropout is on."""
        hidden = jnp.tanh(affine(x, self.tower.weights(x.dtype)))
        if keys is not None and dropout:
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, hidden.shape[1:]))(keys)
            hidden = jnp.where(keep, hidden / (1 - dropout), 0).astype(x.dtype)

        def layer(hidden, weights):
            return hidden + jnp.tanh(affine(hidden, weights)), None

        hidden, _ = jax.lax.scan(layer, hidden, self.layers.weights(x.dtype))
        return affine(hidden, self.head.weights(x.dtype))[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graph, arrays, x):
    """A function outside the class, so that runs on the same mesh share its compiled program."""
    return nnx.merge(graph, arrays)(x)


def toy_config(**changes) -> ConfigDict:
    """Returns the toy's config with values by dotted key, with "__" for ".": `toy_config(data__seed=3)`."""
    config = base_config(PATH)
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()
