"""Figures of a flow of images: samples beside real images, and trajectories from noise to images."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num, UInt8
from matplotlib.figure import Figure

ROWS, COLUMNS = 10, 10  # of a gallery


class Gallery:
    """Collects the first ten images of each of the first ten labels, or a hundred images without labels.

    It is an `image_datasets.Score` that measures nothing.
    """

    def __init__(self, num_classes: int):
        self._labelled = num_classes > 0
        self.rows: list[list[np.ndarray]] = [[] for _ in range(min(num_classes or ROWS, ROWS))]
        # Enough images to fill the rows, although labels are not equally frequent.
        self.num_candidates = 2 * COLUMNS * max(num_classes, ROWS)

    def add(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"]) -> None:
        """Adds images to rows that are not full."""
        for image, label in zip(images, labels, strict=True):
            rows = [int(label)] if self._labelled else range(len(self.rows))
            row = next((row for row in rows if row < len(self.rows) and len(self.rows[row]) < COLUMNS), None)
            if row is not None:
                self.rows[row].append(image)

    def results(self) -> dict[str, float]:
        """Returns no scores."""
        return {}

    def sheet(self, levels: int) -> UInt8[np.ndarray, "H W C"]:
        """Returns all images in one, with white in place of missing ones."""
        shape = next((image.shape for row in self.rows for image in row), (1, 1, 1))
        blank = np.full(shape, levels - 1, np.uint8)
        return tiled([[*row, *[blank] * (COLUMNS - len(row))] for row in self.rows], levels - 1)


def tiled(rows: Any, between: float | int) -> Num[np.ndarray, "H W C"]:
    """Returns rows of images [I, I, C] in one image, separated by lines of the value `between`."""

    def with_border(image):
        line = max(1, len(image) // 32)
        return np.pad(image, ((0, line), (0, line), (0, 0)), constant_values=between)

    return np.concatenate([np.concatenate([with_border(image) for image in row], axis=1) for row in rows])


def draw_grid(path: Path, samples: Gallery, real: Gallery, levels: int) -> None:
    """Draws one row per label: samples on the left, real images on the right."""
    figure = Figure(figsize=(2 * COLUMNS * 0.45, len(samples.rows) * 0.45 + 0.4), layout="constrained")
    titles = ("samples", "held-out images")
    for axes, gallery, title in zip(figure.subplots(1, 2), (samples, real), titles, strict=True):
        _show(axes, gallery.sheet(levels) / (levels - 1), title)
    figure.savefig(path, dpi=110)


def draw_flow(path: Path, frames: Float[np.ndarray, "T N I I C"]) -> None:
    """Draws one row per sample, from noise on the left to the image on the right, for values in [-1, 1]."""
    rows = tiled(np.swapaxes(frames, 0, 1), 1.0)
    figure = Figure(figsize=(len(frames) * 0.6, frames.shape[1] * 0.6 + 0.3), layout="constrained")
    _show(figure.subplots(), np.clip((rows + 1) / 2, 0, 1), "t = 0 ... 1")
    figure.savefig(path, dpi=110)


def _show(axes, image: np.ndarray, title: str) -> None:
    """Shows an image with values in [0, 1], grey or RGB."""
    grey = image.shape[2] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
