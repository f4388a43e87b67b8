"""The Frechet distance of samples to real images, in features of the user's choice, from moments alone."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8

from flow_jax.callables import call_now
from flow_jax.metrics.moments import Moments, frechet
from train_jax.core.errors import UserError
from train_jax.core.import_path import imported

PIXELS = "pixels"
SIDE = 32  # of pixels as features, to which larger images are averaged down: their covariance has 75 MB

Features = Callable[[np.ndarray], np.ndarray]


def pixels(images: UInt8[np.ndarray, "N I I C"]) -> Float[np.ndarray, "N F"]:
    """Values of the pixels; of images beyond 32 x 32 the means over areas of that grid."""
    x, size = np.asarray(images, np.float64), images.shape[1]
    if size > SIDE:
        means = area_means(size, SIDE)
        x = np.einsum("ai,bj,nijc->nabc", means, means, x, optimize=True)
    return x.reshape(len(x), -1)


def area_means(size: int, side: int) -> Float[np.ndarray, "{side} {size}"]:
    """The matrix that averages `size` equal cells of a line over `side` equal parts of it."""
    low = np.arange(side)[:, None] * (size / side)
    cells = np.arange(size)[None]
    overlap = np.minimum(low + size / side, cells + 1) - np.maximum(low, cells)
    return np.maximum(overlap, 0) * (side / size)


def features_of(name: str) -> Features:
    """The function that a config names: "pixels", or the import path of one: uint8 [N, I, I, C] -> float [N, F].

    Raises:
      UserError: there is no such function; when it is called, if it does not return such features.
    """
    if name == PIXELS:
        return pixels
    function = imported("eval.features", name)

    def checked(images):
        found = np.asarray(function(images))
        if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
            raise UserError(
                f"eval.features={name!r} returned an array {found.shape} of {found.dtype} for {len(images)} images, "
                f"expected finite numbers ({len(images)}, features): correct the function."
            )
        return found

    return checked


class FrechetScore:
    """A score (image_datasets.Score) of samples against the moments of real images."""

    def __init__(self, features: Features, real: Moments):
        self._features, self._real, self._moments = features, real, Moments()

    def add(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"]) -> None:
        """Takes in samples."""
        self._moments.add(call_now(self._features, images))

    def results(self) -> dict[str, float]:
        """The distance."""
        return {"frechet": frechet(self._real, self._moments)}
