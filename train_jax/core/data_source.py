"""`DataSource`, the interface from which the input pipeline reads training examples."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from train_jax.core.errors import UserError

Batch = dict[str, np.ndarray]
Example = dict[str, Any]  # numpy arrays and scalars

BAD = "bad"  # key of an example, see DataSource
ROW = "row_number"  # key of a batch: index of each example in the global batch, int32
SLOTS, POSITIONS = "slots", "positions"  # keys of a batch of packed rows, see data.layout.StepLayout


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How examples of different lengths are laid out in a batch (train_jax/data/layout.py).

    Attributes:
      context: computed positions before the tokens of every example, such as image patches.
      limit: most tokens of an example.
      shapes: most shapes of a batch, beside the one in which every example fits.
      packed: whether several examples may share a row.
      quadratic: cost of attention to one position, in units of the cost of everything else.
    """

    context: int
    limit: int
    shapes: int
    packed: bool = False
    quadratic: float = 0.0


class DataSource(abc.ABC):
    """Random access to examples; several threads or worker processes may read at once.

    All examples have the same keys, shapes and dtypes. A bad row (one that cannot be used) keeps its index and has
    weight 0. The source may mark it with the key "bad" (bool scalar, False for good rows); the pipeline removes that
    key from batches and passes the marks to `on_rows`.

    Attributes:
      fingerprint: stable hash of the examples and their order, or None. A run may only resume with an equal one.
      group: number of rows that are read together, see `get_batch`.
      lengths: for examples of different lengths, which the methods `lengths_of` and `trim` then serve; None if all
        examples have one length. Only with `group` 1.
      bad_rows: {index: name} of the bad rows counted so far.
    """

    fingerprint: str | None = None
    group: int | None = 1
    lengths: Lengths | None = None
    bad_rows: Mapping[int, str] = {}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def get_batch(self, indices: np.ndarray, step: int, rows: np.ndarray) -> Batch:
        """Reads the examples of a step that this process needs, stacked in the order of `indices`.

        Override it if examples depend on the step (random augmentation), on the row of the global batch (noise) or on
        other rows (coupling of noise and images). The rows [k group, (k + 1) group) are always passed together (group
        None: the whole batch; 1: no grouping), also to a process that needs only some of them and drops the rest.
        So a batch does not depend on which process reads which rows. By default the examples depend on `indices` alone.

        Args:
          indices: int [n], indices of the examples.
          step: of the run.
          rows: int [n], ascending rows of the global batch, 0 ... batch_size - 1.
        """
        del step, rows
        return stack([self[int(index)] for index in indices])

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of examples, int [n], at most `lengths.limit`.

        Every process calls it for all examples of a step, so it should read as little of them as it can.
        """
        raise UserError(f"{type(self).__name__} has `lengths`, expected a method lengths_of: add it.")

    def trim(self, batch: Batch, length: int) -> Batch:
        """Returns a batch whose examples have room for `length` tokens in place of `lengths.limit`."""
        change = "rename its method cut, the name in earlier releases" if hasattr(self, "cut") else "add it"
        raise UserError(f"{type(self).__name__} has `lengths`, expected a method trim: {change}.")

    def on_rows(self, indices: np.ndarray, bad: np.ndarray) -> None:
        """Counts the rows of a batch; called in the training process when the batch is used, wherever it was read.

        Args:
          indices: int [n], indices of the examples.
          bad: bool [n].

        Raises:
          UserError: the fraction of bad rows is too large.
        """

    def check(self) -> None:
        """Checks the fraction of bad rows among all counted rows; called at the end of a run. Raises UserError."""


@runtime_checkable
class Indexed(Protocol):
    """A sequence that can be indexed by integers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ExampleList(DataSource):
    """A DataSource over a sequence of examples."""

    def __init__(self, examples: Indexed):
        self._examples = examples
        self.fingerprint = getattr(examples, "fingerprint", None)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def stack(examples: Sequence[Example]) -> Batch:
    """Stacks examples with equal keys and shapes along a new first axis."""
    batch = {}
    for name in examples[0]:
        values = [np.asarray(example[name]) for example in examples]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(f"examples of one batch have shapes {shapes} for {name!r}, expected one shape")
        batch[name] = np.stack(values)
    return batch
