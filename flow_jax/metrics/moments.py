"""Mean and covariance of features that come in batches, and the Frechet distance between two of them.

They are computed on the host in float64. Axes: N examples, F features.
"""

import functools

import numpy as np
from jaxtyping import Float, Num

from flow_jax.argument_checks import check_numbers
from flow_jax.arrays import AnyArray
from train_jax.core.errors import UserError


class Moments:
    """The number, mean and covariance of feature vectors, updated by batches; F^2 numbers for any N."""

    def __init__(self):
        self.count = 0
        self.mean: np.ndarray = np.zeros(0)  # [F]
        self._scatter: np.ndarray = np.zeros((0, 0))  # [F, F], sum over rows of (x - mean) (x - mean)^T

    @classmethod
    def of(cls, rows: Num[AnyArray, "..."]) -> "Moments":
        """Returns the moments of an array of feature vectors."""
        moments = cls()
        moments.add(rows)
        return moments

    def add(self, rows: Num[AnyArray, "..."]) -> None:
        """Adds a batch, by sums around the means of the parts, which do not cancel (Chan et al. 1983).

        Raises:
          UserError: rows are not finite vectors of the same length as before.
        """
        check_numbers("features", rows)
        x = np.asarray(rows, np.float64)
        if x.ndim != 2 or not np.isfinite(x).all():
            raise UserError(f"features have shape {list(x.shape)}, expected finite numbers, one vector per row [N, F].")
        if not len(x):
            return
        mean = x.mean(axis=0)
        centred = x - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self.mean, self._scatter = len(x), mean, scatter
        else:
            if x.shape[1] != len(self.mean):
                raise UserError(f"rows have {x.shape[1]} features, those before {len(self.mean)}: make them equal.")
            total = self.count + len(x)
            gap = mean - self.mean
            self._scatter += scatter + np.outer(gap, gap) * (self.count * len(x) / total)
            self.mean = self.mean + gap * (len(x) / total)
            self.count = total
        self.__dict__.pop("root", None)

    @property
    def covariance(self) -> Float[np.ndarray, "F F"]:
        """The covariance, divided by N - 1. Raises UserError if N < 2."""
        if self.count < 2:
            raise UserError(f"the number of rows is {self.count}, expected at least 2 for a covariance: add more.")
        return self._scatter / (self.count - 1)

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "F F"]:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """Returns |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    The trace of the root is computed as the sum of the square roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2),
    which is symmetric: it is stable for singular covariances (fewer rows than features) and never complex. The root of
    S_a is cached in `a`.

    Raises:
      UserError: the numbers of features differ, or there are fewer than two rows.
    """
    if a.covariance.shape != b.covariance.shape:
        raise UserError(f"features have {len(a.mean)} and {len(b.mean)} entries, expected one number: make them equal.")
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(a.root @ b.covariance @ a.root), 0)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
