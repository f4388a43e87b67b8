"""`tf.image.resize` with method "bilinear" in numpy, with the same float32 operations.

big_vision truncates the result to uint8, where a last-bit difference can become a whole grey level. The arithmetic
below keeps TensorFlow's order and is bit-identical (tests/golden/tf_resize). Output pixel x samples the input at
(x + 0.5) * in / out - 0.5 (half-pixel centres).
Sources: tensorflow/core/kernels/image/resize_bilinear_op.cc and scale_and_translate_op.cc.
"""

import numpy as np
from jaxtyping import Float, UInt8


def bilinear(
    image: UInt8[np.ndarray, "height width channels"], shape: tuple[int, int], antialias: bool = False
) -> Float[np.ndarray, "new_height new_width channels"]:
    """Resizes to `shape` = (height, width) without keeping the aspect ratio; float32 in the image's range, 0 to 255.

    With `antialias`, shrinking widens the triangle kernel to the sampling distance; enlarging gives the same result
    with or without it, up to rounding.
    """
    if image.shape[:2] == tuple(shape):
        return image.astype(np.float32)
    return _antialiased(image, shape) if antialias else _interpolated(image, shape)


def _interpolated(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Mixes the four neighbours: horizontally first, then vertically, each as a + (b - a) * t."""
    (top, bottom, dy), (left, right, dx) = (_neighbours(old, new) for old, new in zip(image.shape, shape, strict=False))
    dy, dx = dy[:, None, None], dx[None, :, None]
    upper, lower = image[top].astype(np.float32), image[bottom].astype(np.float32)
    upper = upper[:, left] + (upper[:, right] - upper[:, left]) * dx
    lower = lower[:, left] + (lower[:, right] - lower[:, left]) * dx
    return upper + (lower - upper) * dy


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centre = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5)
    floor = np.floor(centre)
    below = np.maximum(floor, 0).astype(np.int64)
    above = np.minimum(np.ceil(centre), old - 1).astype(np.int64)
    return below, above, centre - floor


def _antialiased(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Computes weighted sums over spans of pixels, rows first, then columns."""
    rows = _gather(image.astype(np.float32), *_spans(image.shape[0], shape[0]))
    return _gather(rows.swapaxes(0, 1), *_spans(image.shape[1], shape[1])).swapaxes(0, 1)


def _spans(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each output's first pixel, int [new], and triangle weights, float32 [new, taps] with rows summing to 1.

    Reciprocals and running sums are placed as in TensorFlow; other roundings change grey levels.
    """
    one, half = np.float32(1), np.float32(0.5)
    scale = one / (np.float32(new) / np.float32(old))
    radius = np.maximum(scale, one)
    centre = (np.arange(new, dtype=np.float32) + half) * scale
    start = np.maximum(np.ceil(centre - radius - half), 0).astype(np.int64)
    stop = np.minimum(np.floor(centre + radius - half), old - 1).astype(np.int64) + 1
    pixel = start[:, None] + np.arange((stop - start).max())
    distance = np.abs((pixel.astype(np.float32) + half - centre[:, None]) * (one / radius))
    weights = np.where(pixel < stop[:, None], np.maximum(one - distance, np.float32(0)), np.float32(0))
    total = np.cumsum(weights, axis=1, dtype=np.float32)[:, -1:]
    return start, weights * (one / total)


def _gather(image: np.ndarray, start: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Contracts the leading axis with the spans, adding one tap after the other."""
    total = np.zeros((len(start), *image.shape[1:]), np.float32)
    for tap in range(weights.shape[1]):
        pixel = np.minimum(start + tap, len(image) - 1)  # beyond the end only where the weight is 0
        total += image[pixel] * weights[:, tap, None, None]
    return total
