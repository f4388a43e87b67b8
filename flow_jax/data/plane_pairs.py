"""Pairs of noise and data for a training step: drawn by (seed, step), coupled on the host ahead of the device."""

import numpy as np
from jaxtyping import Float, Int

from flow_jax.couplings import pairings
from flow_jax.data import toys
from flow_jax.data.row_draws import draw_rows, in_groups
from train_jax.core.data_source import DataSource

_NOISE = 1  # of the random streams of a run
_BLOCK = 256  # rows of noise drawn at a time


class ToyPairs(DataSource):
    """Rows {"x_0": [2], "x_1": [2]} of a training set in the plane, and fresh noise in every step.

    Noise is a function of the seed, the step and the row of the global batch. Coupled "exact", the rows of a group are
    paired by the permutation of least squared distance; otherwise noise and data meet as they come (for "sinkhorn" the
    device pairs them in the step).

    Args:
      data, noise: names of distributions, see toys.py.
      size: of the training set.
      coupling: one of flow_task.COUPLINGS.
      seed: of the training set and of the noise.
      group: rows of the global batch that are coupled with one another; None = all of them.
    """

    def __init__(self, data: str, noise: str, size: int, coupling: str, seed: int, group: int | None = None):
        self._points = toys.draw(data, size, (seed, 0))
        toys.draw(noise, 1, 0)  # an unknown name is told before the run begins
        self._noise, self._coupling, self._seed = noise, coupling, seed
        self.group = group if coupling == "exact" else 1
        self.fingerprint = f"{data}-{noise}-{size}-{coupling}-{seed}"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.get_batch(np.array([index]), 0).items()}

    def get_batch(
        self, indices: Int[np.ndarray, " n"], step: int, rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, Float[np.ndarray, "n 2"]]:
        """The examples of a step at some rows of its batch, the first ones if None; see DataSource."""
        rows = np.arange(len(indices)) if rows is None else rows
        x_0, x_1 = self._noise_of(rows, step), self._points[indices]
        if self._coupling == "exact":
            for places in in_groups(rows, self.group):
                i, j = pairings.exact(x_0[places], x_1[places])
                x_0[places], x_1[places] = x_0[places][i], x_1[places][j]
        return {"x_0": x_0, "x_1": x_1}

    def _noise_of(self, rows: Int[np.ndarray, " n"], step: int) -> Float[np.ndarray, "n 2"]:
        seed = self._seed, _NOISE, step
        return draw_rows(rows, _BLOCK, lambda block: toys.draw(self._noise, _BLOCK, (*seed, block)))
