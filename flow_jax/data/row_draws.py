"""What is decided on the host for rows of a batch by their numbers alone, whoever reads which rows."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int


def draw_rows(
    rows: Int[np.ndarray, " n"], block: int, draw: Callable[[int], Float[np.ndarray, "b ..."]]
) -> Float[np.ndarray, "n ..."]:
    """Row r is row r % block of what `draw` makes for block r // block: a seed for each block, not for each row.

    Args:
      rows: their numbers, 0 or more.
      block: rows of a block. Blocks are drawn whole: large ones cost little a row, small ones waste little.
      draw: number of a block -> its rows.
    """
    numbers, places = np.divmod(rows, block)
    blocks, which = np.unique(numbers, return_inverse=True)
    return np.concatenate([draw(number) for number in blocks.tolist()])[which * block + places]


def in_groups(rows: Int[np.ndarray, " n"], size: int | None) -> Iterator[Int[np.ndarray, " m"]]:
    """Where in `rows` those of a group stand, group by group: numbers [k size, (k + 1) size); all of them if None."""
    numbers = np.zeros_like(rows) if size is None else rows // size
    for number in np.unique(numbers):
        yield np.flatnonzero(numbers == number)
