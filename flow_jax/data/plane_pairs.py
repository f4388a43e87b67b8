"""Pairs of noise and points for training: drawn by (seed, step, row) and coupled on the host, ahead of the device."""

import hashlib

import numpy as np
from jaxtyping import Float, Int

from flow_jax.couplings import pairings
from flow_jax.data import toys
from flow_jax.data.row_draws import draw_rows, in_groups
from train_jax.core.data_source import DataSource

_NOISE = 1  # number of the random stream
_BLOCK = 256  # rows of noise drawn at once


def _identity(name: str) -> str:
    """Returns a distribution's name, with a hash of some points where a user's function draws them."""
    if name in toys.TOYS:
        return name
    return f"{name}-{hashlib.sha256(toys.draw(name, _BLOCK, 0).tobytes()).hexdigest()[:16]}"


class ToyPairs(DataSource):
    """A source of {"x_0": [2], "x_1": [2]}: fresh noise in every step, and points of a training set in the plane.

    Noise is a function of the seed, the step and the row of the global batch. With the coupling "exact" the rows of a
    group are paired by the permutation with the least squared distance; otherwise pairs are random (for "sinkhorn" the
    device pairs them in the step).

    Args:
      data, noise: names or import paths of distributions, see toys.draw.
      size: of the training set.
      coupling: one of flow_task.COUPLINGS.
      seed: for the training set and the noise.
      group: number of rows of the global batch that are coupled with one another; None for all of them.
    """

    def __init__(self, data: str, noise: str, size: int, coupling: str, seed: int, group: int | None = None):
        self._points = toys.draw(data, size, (seed, 0))
        toys.draw(noise, 1, 0)  # raises UserError for an unknown name before the run begins
        self._noise, self._coupling, self._seed = noise, coupling, seed
        self.group = group if coupling == "exact" else 1
        self.fingerprint = f"{_identity(data)}-{_identity(noise)}-{size}-{coupling}-{seed}"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.get_batch(np.array([index]), 0).items()}

    def get_batch(
        self, indices: Int[np.ndarray, " n"], step: int, rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, Float[np.ndarray, "n 2"]]:
        """Returns the examples for the given rows of a step's batch, or for rows 0, 1, ... if None; see DataSource."""
        rows = np.arange(len(indices)) if rows is None else rows
        x_0, x_1 = self._noise_of(rows, step), self._points[indices]
        if self._coupling == "exact":
            for group in in_groups(rows, self.group):
                i, j = pairings.exact(x_0[group], x_1[group])
                x_0[group], x_1[group] = x_0[group][i], x_1[group][j]
        return {"x_0": x_0, "x_1": x_1}

    def _noise_of(self, rows: Int[np.ndarray, " n"], step: int) -> Float[np.ndarray, "n 2"]:
        seed = self._seed, _NOISE, step
        return draw_rows(rows, _BLOCK, lambda block: toys.draw(self._noise, _BLOCK, (*seed, block)))
