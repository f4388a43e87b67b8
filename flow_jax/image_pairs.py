"""Pairs of noise and images for a training step: drawn by (seed, step), coupled on the host ahead of the device."""

import numpy as np
from jaxtyping import Float, Int, UInt8

from flow_jax import couplings

_NOISE = 1  # of the random streams of a run


class ImagePairs:
    """Rows {"x_0": [I, I, C], "x_1": [I, I, C], "label": []} of images in [-1, 1], and fresh noise in every step.

    Coupled "exact", the rows of a step that this process reads are paired by the permutation of least squared distance
    within each class, so that every class starts from all of the noise.

    Args:
      images: of `levels` values.
      labels: what they show, or None: rows have no label then, and are paired across all.
      levels: 256 for bytes.
      dequantize: add uniform noise of one value, fresh in every step, so that a density exists.
      coupling: one of flow_task.COUPLINGS.
      seed, process: of the noise; each process draws its own.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "N I I C"],
        labels: Int[np.ndarray, " N"] | None,
        levels: int,
        dequantize: bool,
        coupling: str,
        seed: int,
        process: int = 0,
    ):
        self._images, self._labels, self._levels, self._dequantize = images, labels, levels, dequantize
        self._coupling, self._seed, self._process = coupling, seed, process

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.together(np.array([index]), 0).items()}

    def together(self, indices: Int[np.ndarray, " n"], step: int) -> dict[str, np.ndarray]:
        """The rows of a step, see train_jax.input.Source."""
        rng = np.random.default_rng((self._seed, _NOISE, step, self._process))
        x_0 = rng.standard_normal((len(indices), *self._images.shape[1:]), np.float32)
        x_1 = to_range(self._images[indices], self._levels, rng if self._dequantize else None)
        labels = None if self._labels is None else self._labels[indices].astype(np.int32)
        if self._coupling == "exact":
            alike = np.zeros(len(indices), np.int32) if labels is None else labels
            i, j = couplings.within_class(x_0, x_1, alike, alike)
            x_0, x_1, labels = x_0[i], x_1[j], None if labels is None else labels[j]
        rows = {"x_0": x_0, "x_1": x_1}
        return rows if labels is None else rows | {"label": labels}


def to_range(
    images: UInt8[np.ndarray, "N I I C"], levels: int, rng: np.random.Generator | None
) -> Float[np.ndarray, "N I I C"]:
    """Values 0 to levels - 1 to [-1, 1]; with `rng` each anywhere in its own interval of the range."""
    if rng is None:
        return images.astype(np.float32) / ((levels - 1) / 2) - 1
    return (images + rng.random(images.shape, np.float32)) / (levels / 2) - 1


def to_levels(x: Float[np.ndarray, "N I I C"], levels: int, dequantized: bool) -> UInt8[np.ndarray, "N I I C"]:
    """The nearest value of each entry, as `to_range` had it."""
    x = np.asarray(x, np.float32) + 1
    values = np.floor(x * (levels / 2)) if dequantized else np.rint(x * ((levels - 1) / 2))
    return np.clip(values, 0, levels - 1).astype(np.uint8)
