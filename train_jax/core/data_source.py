"""Where training examples come from: `DataSource`, which the input pipeline reads."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
Example = dict[str, Any]  # numpy arrays and scalars

BAD = "bad"  # key of an example, see DataSource


class DataSource(abc.ABC):
    """Random access to examples; reads happen in several threads (or worker processes) at once.

    Every example has the same keys, shapes and dtypes. A bad row keeps its place: it comes with weight 0. It may be
    marked by the key "bad" (bool scalar, False in good ones), which batches do not hold; `on_rows` is told of it.

    Attributes:
      fingerprint: stable hash of what the examples are and of their order; None if it has none. A run may only resume
        on an equal one.
      group: see `get_batch`.
      bad_rows: name by row number of the bad rows counted so far.
    """

    fingerprint: str | None = None
    group: int | None = 1
    bad_rows: Mapping[int, str] = {}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def get_batch(self, indices: np.ndarray, step: int, rows: np.ndarray) -> Batch:
        """The examples of a step that this process reads at once, stacked in the order of `indices`.

        For examples that depend on the step (random views), on the row of the global batch (fresh noise) or on other
        rows (which noise goes with which image). Rows [k group, (k + 1) group) come together (None: the whole batch;
        1: each for itself), also to processes that have a part of them alone, which drop the rest. So a batch does
        not depend on who reads which rows of it. By default the examples, whatever step and row.

        Args:
          indices: int [n], numbers of the examples.
          step: of the run.
          rows: int [n], increasing: rows of the global batch, 0 ... batch_size - 1.
        """
        del step, rows
        return stack([self[int(index)] for index in indices])

    def on_rows(self, indices: np.ndarray, bad: np.ndarray) -> None:
        """Counts rows of a batch as it is handed out: called in the training process, whoever read them.

        Args:
          indices: int [n], numbers of the examples.
          bad: bool [n].

        Raises:
          UserError: too many bad ones.
        """

    def check(self) -> None:
        """Checks the share of bad rows among all counted so far; called at the end of a run. Raises UserError."""


@runtime_checkable
class Indexed(Protocol):
    """What has a length and an entry for each number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ExampleList(DataSource):
    """A sequence of examples as a DataSource."""

    def __init__(self, examples: Indexed):
        self._examples = examples
        self.fingerprint = getattr(examples, "fingerprint", None)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def stack(examples: Sequence[Example]) -> Batch:
    """Stacks examples on a new first axis; examples that differ in keys or shapes are a fault of the source."""
    batch = {}
    for name in examples[0]:
        values = [np.asarray(example[name]) for example in examples]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(f"examples of one batch have shapes {shapes} for {name!r}, expected one shape")
        batch[name] = np.stack(values)
    return batch
