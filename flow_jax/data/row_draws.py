"""Draws and groups of rows on the host that depend only on the rows' numbers, not on which process reads them."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int


def draw_rows(
    rows: Int[np.ndarray, " n"], block: int, draw: Callable[[int], Float[np.ndarray, "b ..."]]
) -> Float[np.ndarray, "n ..."]:
    """Draws rows in blocks, with one seed per block: row r is row r % block of `draw(r // block)`.

    Args:
      rows: numbers of the rows, 0 or more.
      block: number of rows in a block. Blocks are drawn whole: large blocks are faster per row, small ones waste fewer
        rows.
      draw: number of a block -> its rows.
    """
    numbers, offsets = np.divmod(rows, block)
    blocks, positions = np.unique(numbers, return_inverse=True)
    return np.concatenate([draw(number) for number in blocks.tolist()])[positions * block + offsets]


def in_groups(rows: Int[np.ndarray, " n"], size: int | None) -> Iterator[Int[np.ndarray, " m"]]:
    """Yields the positions in `rows` of each group of numbers [k size, (k + 1) size); one group if size is None."""
    numbers = np.zeros_like(rows) if size is None else rows // size
    for number in np.unique(numbers):
        yield np.flatnonzero(numbers == number)
