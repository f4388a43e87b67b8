"""Synthetic images for trying a model without data: a coloured disc, square or cross on a dark ground."""

import zlib

import numpy as np

from flow_jax.data.image_sets import LabeledImage

CLASSES = ("disc", "square", "cross")
_SALT = zlib.crc32(b"shapes")


class ShapeImages:
    """Images that are functions of the split and the row."""

    def __init__(self, split: str, number: int, size: int, channels: int):
        self._split, self._number, self._size, self._channels = split, number, size, channels
        self.fingerprint = f"shapes-{split}-{number}-{size}-{channels}"

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> LabeledImage:
        rng = np.random.default_rng((_SALT, zlib.crc32(self._split.encode()), index))
        radius = rng.uniform(0.15, 0.3)
        x, y = rng.uniform(radius, 1 - radius, 2)
        ground, colour = rng.uniform(0, 0.3, self._channels), rng.uniform(0.5, 1, self._channels)
        line = (np.arange(self._size) + 0.5) / self._size
        across, down = np.abs(line[None] - x), np.abs(line[:, None] - y)
        inside = {
            "disc": np.hypot(across, down) <= radius,
            "square": np.maximum(across, down) <= radius,
            "cross": (np.maximum(across, down) <= radius) & (np.minimum(across, down) <= radius / 3),
        }[CLASSES[self.label(index)]]
        pixels = np.where(inside[..., None], colour, ground) * 255
        return LabeledImage(np.rint(pixels).astype(np.uint8), self.label(index))

    def label(self, index: int) -> int:
        """Returns the class of an image."""
        return index % len(CLASSES)

    def name(self, index: int) -> str:
        """Returns a name for messages."""
        return f"{self._split} shape {index}"
