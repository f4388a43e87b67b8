"""Lays out the examples of a step in a batch of one of a few static shapes, so that little of it is padding.

A compiled step has one shape, and examples differ in length. There are two ways to save padding. Neither
changes the value or the gradient of the loss, up to rounding, compared with rows that are padded to the limit.

  buckets   A step takes the shortest of a few lengths in which its longest example fits.
  packing   Several examples share a row, in which they do not see one another. Every device has
            r rows of L positions for its g examples of a micro-batch:

    three examples, r = 2      image a  text a   image b  text b
                               image c  text c c c c c c  padding

A step always holds exactly `batch_size` examples: the same ones as without packing, with the same numbers, from which
their random keys are made. Packing only divides them differently among micro-batches and devices. It takes the longest
example first and gives each to the device with the fewest positions so far that still lacks one of its g examples.
Within a device it again takes the longest first and puts each into the first row with room (first-fit decreasing,
Johnson 1973).

The shapes (r, L) are chosen once, for steps drawn from the lengths of the first examples of the stream, so that a
resumed run chooses the same: first the cheapest shape in which all of these steps fit, then further ones as long as
each saves a share SAVING of the cost. The cost of a shape counts its positions, and attention by the square of the row
length. A step takes the cheapest shape in which it fits. The shape with one example of the limit in each row is always
there; it is compiled if ever a step needs it. Every process computes the same layout, because it depends only on the
lengths.
"""

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from train_jax.core.data_source import Lengths
from train_jax.core.errors import UserError

MULTIPLE = 8  # of row lengths and of room for tokens
SAVING, PACKED_SAVING = 0.1, 0.01  # share of the cost that a shape must save, as it takes a compilation
SAMPLE = 512  # examples by whose lengths shapes are chosen
MIN_STEPS, MAX_STEPS, SAMPLED_EXAMPLES = 8, 128, 8192  # steps drawn from these, of about so many examples in all
EXAMPLES = 8  # of average length in a packed row at most
ROW_NUMBERS = 8  # numbers of rows that are tried
QUANTILES = (1.0, 0.95, 0.85, 0.7, 0.5, 0.25)  # of the row lengths that the steps need, of which shapes are made


class Shape(NamedTuple):
    """The static sizes of a batch."""

    rows: int  # r, rows of a device in a micro-batch
    length: int  # L, positions of a row
    tokens: int  # T, most tokens of an example


class StepLayout(NamedTuple):
    """Where the examples of a step are. Axes: A micro-batches, G devices, g examples, C + T positions of an example.

    Attributes:
      numbers: index of each example in the global batch.
      slots: for each position of a row, the position among the g (C + T) of the device's examples, or -1 for padding;
        None if every example is a row.
      positions: the inverse, for each position of an example the one among the r L of the device's rows, or -1.
    """

    shape: Shape
    numbers: Int[np.ndarray, "A G g"]
    slots: Int[np.ndarray, "A G r L"] | None = None
    positions: Int[np.ndarray, "A G g CT"] | None = None


class Layout:
    """Chooses shapes for a stream of examples, and lays out the examples of each step.

    Attributes:
      shapes: the chosen shapes, the cheapest first; every step fits in the last.
    """

    def __init__(self, lengths: Lengths, size: tuple[int, int, int], sample: Int[np.ndarray, " n"]):
        """Chooses the shapes.

        Args:
          lengths: of the source.
          size: A micro-batches, G devices, g examples of a device in a micro-batch.
          sample: numbers of tokens of some examples, from which steps are drawn.
        """
        self._lengths, self._size = lengths, size
        batch = size[0] * size[1] * size[2]
        steps = max(MIN_STEPS, min(MAX_STEPS, SAMPLED_EXAMPLES // batch))
        drawn = np.random.PCG64(0).random_raw(steps * batch)  # stable over releases
        tokens = sample[(drawn % len(sample)).astype(int)].reshape(steps, batch)
        full = Shape(size[2], lengths.context + lengths.limit, lengths.limit)
        fits = self._packed_shapes(tokens) if lengths.packed else self._buckets(tokens)
        self.shapes = sorted([full, *self._choose(full, fits)], key=self._cost)

    def for_step(self, tokens: Int[np.ndarray, " n"]) -> StepLayout:
        """Returns the layout of a step.

        Args:
          tokens: number of tokens of each example, in the order of the batch.

        Raises:
          UserError: an example has more tokens than the limit of its source.
        """
        fitting = [shape for shape in self.shapes if tokens.max() <= shape.tokens]
        if not self._lengths.packed and fitting:
            return StepLayout(fitting[0], np.arange(tokens.size).reshape(self._size))
        numbers, sizes = self._divided(tokens), tokens + self._lengths.context
        for shape in fitting:
            rows = [_first_fit(sizes[group], shape.length, shape.rows) for group in numbers.reshape(-1, self._size[2])]
            if None not in rows:
                return self._packed(numbers, sizes, shape, rows)
        raise UserError(
            f"an example has {tokens.max()} tokens, expected at most {self._lengths.limit}, the limit that its source "
            "gives: correct the source"
        )

    def _divided(self, tokens: np.ndarray) -> Int[np.ndarray, "A G g"]:
        """Divides the examples of a step among micro-batches and devices, with about equal numbers of tokens."""
        A, G, g = self._size
        groups: list[list[int]] = [[] for _ in range(A * G)]
        least = [(0, group) for group in range(A * G)]
        for number in np.argsort(-tokens, kind="stable").tolist():
            total, group = heapq.heappop(least)
            groups[group].append(number)
            if len(groups[group]) < g:
                heapq.heappush(least, (total + int(tokens[number]), group))
        return np.sort(np.array(groups).reshape(A, G, g), axis=2)

    def _packed(self, numbers: np.ndarray, sizes: np.ndarray, shape: Shape, rows: list) -> StepLayout:
        """Returns the layout of a packed step; `rows` has the rows and first positions of each device's examples."""
        A, G, g = self._size
        width = self._lengths.context + shape.tokens
        slots = np.full((A * G, shape.rows * shape.length), -1, np.int32)
        positions = np.full((A * G, g, width), -1, np.int32)
        for group, (row, start) in enumerate(rows):
            for example, number in enumerate(numbers.reshape(A * G, g)[group]):
                first, size = row[example] * shape.length + start[example], int(sizes[number])
                slots[group, first : first + size] = example * width + np.arange(size)
                positions[group, example, :size] = first + np.arange(size)
        slots = slots.reshape(A, G, shape.rows, shape.length)
        return StepLayout(shape, numbers, slots, positions.reshape(A, G, g, width))

    # Choosing shapes.

    def _cost(self, shape: Shape) -> float:
        return shape.rows * shape.length * (1 + self._lengths.quadratic * shape.length)

    def _choose(self, full: Shape, fits: dict[Shape, np.ndarray]) -> list[Shape]:
        """Chooses among shapes, given whether each of the drawn steps fits in them."""
        chosen: list[Shape] = []
        costs = np.full(len(next(iter(fits.values()))), self._cost(full))
        remaining = {shape: where for shape, where in fits.items() if where.all()}
        while len(chosen) < self._lengths.shapes and remaining:
            after = {
                shape: np.where(where, np.minimum(costs, self._cost(shape)), costs)
                for shape, where in remaining.items()
            }
            best = min(after, key=lambda shape: after[shape].sum())
            saving = PACKED_SAVING if self._lengths.packed else SAVING
            if after[best].sum() > (1 - saving) * costs.sum():
                break
            chosen.append(best)
            costs, remaining = after[best], {shape: where for shape, where in fits.items() if shape not in chosen}
        return chosen

    def _buckets(self, steps: Int[np.ndarray, "steps n"]) -> dict[Shape, np.ndarray]:
        """Returns the shapes of one example in each row, and whether each step fits in them."""
        longest = steps.max(axis=1)
        rooms = {min(_rounded(room), self._lengths.limit) for room in longest.tolist()}
        return {Shape(self._size[2], self._lengths.context + room, room): longest <= room for room in rooms}

    def _packed_shapes(self, steps: Int[np.ndarray, "steps n"]) -> dict[Shape, np.ndarray]:
        """Returns shapes of several numbers of rows, and whether each step fits in them."""
        g, context, limit = self._size[2], self._lengths.context, self._lengths.limit
        room = min(_rounded(int(steps.max())), limit)
        sizes = [(step + context)[self._divided(step)].reshape(-1, g) for step in steps]
        fewest, shapes = -(-g // EXAMPLES), {}
        for rows in np.unique(np.geomspace(fewest, g, ROW_NUMBERS).round().astype(int)).tolist():
            needed = np.array([max(_row_length(group, rows) for group in groups) for groups in sizes])
            for quantile in QUANTILES:
                length = _rounded(int(np.quantile(needed, quantile, method="higher")))
                shapes[Shape(rows, length, min(room, length - context))] = needed <= length
        return shapes


def _first_fit(sizes: np.ndarray, length: int, rows: int) -> tuple[list[int], list[int]] | None:
    """Puts examples into rows, the longest first, each into the first row with room.

    Returns:
      The row and the first position of each example; None if the rows do not suffice.
    """
    used, row, start = np.zeros(rows, np.int64), [0] * len(sizes), [0] * len(sizes)
    for example in np.argsort(-sizes, kind="stable").tolist():
        room = used + sizes[example] <= length
        chosen = int(room.argmax())
        if not room[chosen]:
            return None
        row[example], start[example] = chosen, int(used[chosen])
        used[chosen] += sizes[example]
    return row, start


def _row_length(sizes: np.ndarray, rows: int) -> int:
    """Returns the least row length, a multiple of MULTIPLE, at which a bisection finds that examples fit in rows."""
    low = _rounded(max(int(sizes.max()), -(-int(sizes.sum()) // rows)))
    high = max(low, _rounded(int(sizes.max())) * -(-len(sizes) // rows))  # fits: each row takes as many examples
    while low < high:
        middle = _rounded((low + high) // 2)
        if middle >= high:
            middle = high - MULTIPLE
        low, high = (low, middle) if _first_fit(sizes, middle, rows) else (middle + MULTIPLE, high)
    return low


def _rounded(count: int) -> int:
    """Rounds up to a multiple of MULTIPLE."""
    return -(-count // MULTIPLE) * MULTIPLE
