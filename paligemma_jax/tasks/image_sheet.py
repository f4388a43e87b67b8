"""A figure of images in rows, each under its text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from train_jax.report.figure_text import drawable

COLUMNS = 6


def save_image_sheet(
    images: Sequence[UInt8[np.ndarray, "I I 3"]],
    texts: Sequence[str],
    file: Path,
    real: Sequence[UInt8[np.ndarray, "I I 3"]] | None = None,
) -> None:
    """Saves images in rows of six, each under its text.

    Args:
      images: uint8 [0, 255].
      texts: one an image.
      file: the PNG to write.
      real: images that the texts describe, each shown to the right of the image of that text; None for none.
    """
    rows, columns = -(-len(images) // COLUMNS), min(COLUMNS, len(images))
    images_per_cell = 1 if real is None else 2
    figure = Figure(figsize=(1.5 * images_per_cell * columns, 1.9 * rows + 0.3), layout="constrained")
    if real is not None:
        figure.suptitle("left: sample; right: a real image", fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, axes in enumerate(grid):
        axes.set_axis_off()
        if index < len(images):
            shown = [images[index]] if real is None else [images[index], _gap(images[index]), real[index]]
            axes.imshow(np.concatenate(shown, axis=1), interpolation="nearest")
            text = drawable(textwrap.fill(texts[index], 15 * images_per_cell + 3))
            axes.set_title(text, fontsize=7, parse_math=False)
    figure.savefig(file, dpi=110)


def _gap(image: np.ndarray) -> np.ndarray:
    """Returns a white strip of the image's height."""
    return np.full_like(image[:, : max(image.shape[1] // 16, 1)], 255)
