"""Pictures of a flow of images: samples beside real ones, and images on their way."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flow_jax.digits import Digits


def draw_grid(path: Path, samples: Digits, real: Digits, levels: int, columns: int = 10) -> None:
    """A row a label: samples on the left, real images on the right."""
    labels = np.unique(samples.labels)
    sides = [
        np.concatenate(
            [np.concatenate(list(side.images[side.labels == label][:columns, ..., 0]), axis=1) for label in labels]
        )
        for side in (samples, real)
    ]
    figure = Figure(figsize=(2 * columns * 0.45, len(labels) * 0.45 + 0.4), layout="constrained")
    for axes, side, title in zip(figure.subplots(1, 2), sides, ("samples", "held-out images"), strict=True):
        axes.imshow(side, cmap="gray", vmin=0, vmax=levels - 1, interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def draw_flow(path: Path, frames: np.ndarray) -> None:
    """A row a sample, from noise on the left to the image on the right; frames [T, N, I, I, 1] in [-1, 1]."""
    rows = np.concatenate([np.concatenate(list(row[..., 0]), axis=1) for row in np.swapaxes(frames, 0, 1)])
    figure = Figure(figsize=(len(frames) * 0.6, frames.shape[1] * 0.6 + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(title="t = 0 ... 1", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
