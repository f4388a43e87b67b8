"""The Frechet distance between samples and real images in user-defined features, from their moments."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8

from flow_jax.callables import call_now
from flow_jax.metrics.moments import Moments, frechet
from train_jax.core.errors import UserError
from train_jax.core.import_path import imported

PIXELS = "pixels"
SIDE = 32  # larger images are averaged to this size for pixel features, whose covariance then takes 75 MB

Features = Callable[[np.ndarray], np.ndarray]


def pixels(images: UInt8[np.ndarray, "N I I C"]) -> Float[np.ndarray, "N F"]:
    """Returns the pixels as features; images larger than 32 x 32 are averaged to that size."""
    x, size = np.asarray(images, np.float64), images.shape[1]
    if size > SIDE:
        means = area_means(size, SIDE)
        x = np.einsum("ai,bj,nijc->nabc", means, means, x, optimize=True)
    return x.reshape(len(x), -1)


def area_means(size: int, side: int) -> Float[np.ndarray, "{side} {size}"]:
    """Returns the matrix that averages `size` equal cells of a line over `side` equal parts of it."""
    low = np.arange(side)[:, None] * (size / side)
    cells = np.arange(size)[None]
    overlap = np.minimum(low + size / side, cells + 1) - np.maximum(low, cells)
    return np.maximum(overlap, 0) * (side / size)


def features_of(name: str) -> Features:
    """Returns the feature function that a config names, "pixels" or an import path: uint8 [N, I, I, C] -> float [N, F].

    Raises:
      UserError: there is no such function; or, when it is called, it does not return such features.
    """
    if name == PIXELS:
        return pixels
    function = imported("eval.features", name)

    def checked(images):
        features = np.asarray(function(images))
        if features.ndim != 2 or len(features) != len(images) or not np.isfinite(features).all():
            raise UserError(
                f"eval.features={name!r} returned an array {features.shape} of {features.dtype} for {len(images)} "
                f"images, expected finite numbers ({len(images)}, features): correct the function."
            )
        return features

    return checked


class FrechetScore:
    """The Frechet distance between samples and real images with given moments, as an `image_datasets.Score`."""

    def __init__(self, features: Features, real: Moments):
        self._features, self._real, self._moments = features, real, Moments()

    def add(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"]) -> None:
        """Adds a batch of samples."""
        self._moments.add(call_now(self._features, images))

    def results(self) -> dict[str, float]:
        """Returns the distance."""
        return {"frechet": frechet(self._real, self._moments)}
