"""A sheet of pictures with the texts they were drawn for."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

COLUMNS = 6


def save_sheet(
    images: Sequence[UInt8[np.ndarray, "I I 3"]],
    texts: Sequence[str],
    file: Path,
    real: Sequence[UInt8[np.ndarray, "I I 3"]] | None = None,
) -> None:
    """Pictures in rows of six, each under its text; with `real` another beside each, that the text is true of."""
    rows, columns = -(-len(images) // COLUMNS), min(COLUMNS, len(images))
    wide = 1 if real is None else 2
    figure = Figure(figsize=(1.5 * wide * columns, 1.9 * rows + 0.3), layout="constrained")
    if real is not None:
        figure.suptitle("left: sample; right: a real picture", fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, axes in enumerate(grid):
        axes.set_axis_off()
        if place < len(images):
            shown = [images[place]] if real is None else [images[place], _gap(images[place]), real[place]]
            axes.imshow(np.concatenate(shown, axis=1), interpolation="nearest")
            axes.set_title(textwrap.fill(texts[place], 15 * wide + 3), fontsize=7, parse_math=False)
    figure.savefig(file, dpi=110)


def _gap(image: np.ndarray) -> np.ndarray:
    return np.full_like(image[:, : max(image.shape[1] // 16, 1)], 255)
