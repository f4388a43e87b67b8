"""Draws samples from a flow of images in batches of one size, so that any number takes the memory of one batch."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from flow_jax.data.image_datasets import ImageData
from flow_jax.data.image_pairs import to_levels
from flow_jax.ode import guidance, sampling
from flow_jax.tasks.flow_task import solver_arguments
from train_jax.parallel import sharding


class SampleBatch(NamedTuple):
    """A batch of samples.

    Attributes:
      images: grey values.
      labels: their labels, 0 without labels.
      nfe: evaluations of the velocity per sample.
    """

    images: UInt8[np.ndarray, "N I I C"]
    labels: Int[np.ndarray, " N"]
    nfe: int


class ImageSampler:
    """Draws samples with the solver and guidance of `config.eval`; a sample's noise depends only on seed and number."""

    def __init__(
        self, model: nnx.Module, data: ImageData, path: Any, options: ConfigDict, dequantized: bool, mesh: Mesh
    ):
        self._data, self._path, self._options = data, path, options
        self._dequantized, self._mesh = dequantized, mesh
        guided = options.guidance != 1.0
        self.velocity = guidance.Guided(model, options.guidance, data.num_classes) if guided else model

    def batches(self, labels: Int[np.ndarray, " N"]) -> Iterator[SampleBatch]:
        """Yields one sample for each entry of `labels`; a batch is divided over the devices of the mesh."""
        for numbers, good in batches_of(len(labels), self._options.batch_size):
            x_0, args = self.start(numbers, labels)
            result = sampling.sample(self.velocity, x_0, **solver_arguments(self._options), args=args)
            images = to_levels(np.asarray(result.x)[:good], self._data.levels, self._dequantized)
            yield SampleBatch(images, labels[numbers[:good]], int(result.nfe))

    def start(self, numbers: Int[np.ndarray, " n"], labels: Int[np.ndarray, " N"]) -> tuple[Array, tuple]:
        """Returns the starting points of samples by their numbers, and the velocity's arguments: labels, or nothing."""
        shape = (self._data.size, self._data.size, self._data.channels)
        x_0 = self._path.start(noise(self._options.seed, jnp.asarray(numbers), shape))
        args = (jnp.asarray(labels[numbers], jnp.int32),) if self._data.num_classes else ()
        return shard_rows((x_0, args), self._mesh)


@functools.partial(jax.jit, static_argnums=2)
def noise(seed, numbers: Int[Array, " n"], shape: tuple[int, ...]) -> Float[Array, "n I I C"]:
    """Draws standard normal rows, each a function of the seed and its number."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)


def batches_of(number: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields 0 ... number - 1 in batches of one size, so that they compile once, with the number of valid entries.

    The last batch is filled up with the last number.
    """
    size = min(size, number)
    for start in range(0, number, size):
        yield np.minimum(np.arange(start, start + size), number - 1), min(size, number - start)


def shard_rows(rows, mesh: Mesh):
    """Divides rows over the devices of a mesh if their number allows it and there is one process; else returns them."""
    parts = sharding.row_divisor(mesh.shape)
    if jax.process_count() > 1 or any(len(leaf) % parts for leaf in jax.tree.leaves(rows)):
        return rows
    return jax.device_put(rows, sharding.batch_sharding(mesh, accumulate=False))
