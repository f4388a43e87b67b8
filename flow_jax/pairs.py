"""Pairs of noise and data for a training step: drawn by (seed, step), coupled on the host ahead of the device."""

import numpy as np
from jaxtyping import Float, Int

from flow_jax import couplings, toys

_NOISE = 1  # of the random streams of a run


class ToyPairs:
    """Rows {"x_0": [2], "x_1": [2]} of a training set in the plane, and fresh noise in every step.

    Coupled "exact", the rows of a step that this process reads are paired by the permutation of least squared
    distance; otherwise noise and data meet as they come (for "sinkhorn" the device pairs them in the step).

    Args:
      data, noise: names of distributions, see toys.py.
      size: of the training set.
      coupling: one of flow_task.COUPLINGS.
      seed: of the training set and of the noise.
      process: which process this is: each draws its own noise.
    """

    def __init__(self, data: str, noise: str, size: int, coupling: str, seed: int, process: int = 0):
        self._points = toys.draw(data, size, (seed, 0))
        toys.draw(noise, 1, 0)  # an unknown name is told before the run begins
        self._noise, self._coupling, self._seed, self._process = noise, coupling, seed, process
        self.fingerprint = f"{data}-{noise}-{size}-{coupling}-{seed}"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.together(np.array([index]), 0).items()}

    def together(self, indices: Int[np.ndarray, " n"], step: int) -> dict[str, Float[np.ndarray, "n 2"]]:
        """The rows of a step, see train_jax.input.Source."""
        x_1 = self._points[indices]
        x_0 = toys.draw(self._noise, len(x_1), (self._seed, _NOISE, step, self._process))
        if self._coupling == "exact":
            i, j = couplings.exact(x_0, x_1)
            x_0, x_1 = x_0[i], x_1[j]
        return {"x_0": x_0, "x_1": x_1}
