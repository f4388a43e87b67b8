"""Pairs of noise and images for training: drawn by (seed, step, row) and coupled on the host, ahead of the device."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from flow_jax.couplings import pairings
from flow_jax.data.image_datasets import ImageData
from flow_jax.data.row_draws import draw_rows, in_groups
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError
from train_jax.core.row_errors import BadRows

_NOISE, _FLIP, _DEQUANTIZATION = 1, 2, 3  # numbers of the random streams
_BLOCK = 16  # rows of noise drawn at once


class ImagePairs(DataSource):
    """A source of {"x_0": [I, I, C], "x_1": [I, I, C], "label": [], "weight": []}: noise, and images in [-1, 1].

    Noise is a function of the seed, the step and the row of the global batch. With the coupling "exact" the rows of a
    group are paired by the permutation with the least squared distance within each class, so that the noise of every
    class is standard normal. Data without classes have no "label" and are paired regardless of class. A bad image is
    replaced by grey and has weight 0 (see DataSource).

    Args:
      data: the images; the training split is read.
      dequantize: add uniform noise of one grey value, fresh in every step, so that a density exists.
      coupling: one of flow_task.COUPLINGS.
      seed: for noise and flips.
      group: number of rows of the global batch that are coupled with one another; None for all of them.
      flip: mirror each image left to right with probability 1/2, by (seed, step, number of the image).
      on_error, max_bad_fraction: see BadRows.
    """

    def __init__(
        self,
        data: ImageData,
        dequantize: bool,
        coupling: str,
        seed: int,
        *,
        group: int | None = None,
        flip: bool = False,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        self._data, self._dequantize, self._coupling = data, dequantize, coupling
        self._seed, self._flip = seed, flip
        self.group = group if coupling == "exact" else 1
        self._bad_row_counts = BadRows(len(data.train), on_error, max_bad_fraction)
        self.fingerprint = data.train.fingerprint

    def __len__(self) -> int:
        return len(self._data.train)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.get_batch(np.array([index]), 0).items()}

    def get_batch(
        self, indices: Int[np.ndarray, " n"], step: int, rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the examples for the given rows of a step's batch, or for rows 0, 1, ... if None; see DataSource."""
        rows = np.arange(len(indices)) if rows is None else rows
        images, labels, bad = self._read(indices)
        if self._flip:
            flipped = np.array([self._flips(int(index), step) for index in indices], bool)
            images[flipped] = images[flipped, :, ::-1]
        uniform = self._draw(np.random.Generator.random, _DEQUANTIZATION, step, rows) if self._dequantize else None
        x_0 = self._draw(np.random.Generator.standard_normal, _NOISE, step, rows)
        x_1 = to_range(images, self._data.levels, uniform)
        if self._coupling == "exact":
            classes = labels if self._data.num_classes else np.zeros_like(labels)
            classes = np.where(bad, -1, classes)  # bad rows are a class of their own, so that they exchange no noise
            for group in in_groups(rows, self.group):
                i, j = pairings.within_class(x_0[group], x_1[group], classes[group], classes[group])
                x_0[group] = x_0[group][i][np.argsort(j)]  # reorders only the noise: images keep the order of `indices`
        batch = {"x_0": x_0, "x_1": x_1, "weight": (~bad).astype(np.float32), "bad": bad}
        return batch | {"label": labels} if self._data.num_classes else batch

    def _draw(
        self, method: Callable, stream: int, step: int, rows: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n I I C"]:
        """Draws numbers for rows of a step with a method of np.random.Generator."""
        shape = (_BLOCK, self._data.size, self._data.size, self._data.channels)

        def draw(block: int) -> np.ndarray:
            return method(np.random.default_rng((self._seed, stream, step, block)), shape, np.float32)

        return draw_rows(rows, _BLOCK, draw)

    def on_rows(self, indices: Int[np.ndarray, " n"], bad: Bool[np.ndarray, " n"]) -> None:
        """Counts rows that were read, see BadRows."""
        self._bad_row_counts.count(indices, bad, self._data.train.name)

    @property
    def bad_rows(self) -> dict[int, str]:
        """{row number: name} of the bad rows counted so far."""
        return self._bad_row_counts.names

    def check(self) -> None:
        """Raises UserError if the share of bad rows among all counted so far is too large."""
        self._bad_row_counts.check()

    def _read(self, indices: Int[np.ndarray, " n"]):
        """Returns images [n, I, I, C], labels [n], and whether each is bad [n]."""
        data, n = self._data, len(indices)
        images = np.full((n, data.size, data.size, data.channels), data.levels // 2, np.uint8)
        labels, bad = np.zeros(n, np.int32), np.zeros(n, bool)
        for row, index in enumerate(map(int, indices)):
            try:
                images[row], labels[row] = data.train[index]
            except UserError as error:
                self._bad_row_counts.skip(index, data.train.name(index), error)
                bad[row] = True
        return images, labels, bad

    def _flips(self, index: int, step: int) -> bool:
        return np.random.default_rng((self._seed, _FLIP, step, index)).random() < 0.5


def to_range(
    images: UInt8[np.ndarray, "N I I C"], levels: int, noise: Float[np.ndarray, "N I I C"] | np.random.Generator | None
) -> Float[np.ndarray, "N I I C"]:
    """Maps values 0 ... levels - 1 to [-1, 1].

    Args:
      images: grey values.
      levels: number of grey values.
      noise: dequantization noise in [0, 1), or a generator to draw it, with which each value is spread over a bin of
        width 2 / levels; None for no noise.
    """
    if noise is None:
        return images.astype(np.float32) / ((levels - 1) / 2) - 1
    if isinstance(noise, np.random.Generator):
        noise = noise.random(images.shape, np.float32)
    return (images + noise) / (levels / 2) - 1


def to_levels(x: Float[np.ndarray, "N I I C"], levels: int, dequantized: bool) -> UInt8[np.ndarray, "N I I C"]:
    """Maps [-1, 1] to the nearest grey values: the inverse of `to_range`."""
    x = np.asarray(x, np.float32) + 1
    values = np.floor(x * (levels / 2)) if dequantized else np.rint(x * ((levels - 1) / 2))
    return np.clip(values, 0, levels - 1).astype(np.uint8)
