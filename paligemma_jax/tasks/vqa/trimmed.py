"""Training rows whose texts are trimmed to what a step needs, see train_jax/data/layout.py."""

from collections.abc import Mapping, Sequence

import numpy as np

from paligemma_jax.data.prompts import MASKS
from paligemma_jax.data.records import RecordSource
from paligemma_jax.tasks.vqa.rows import RowProcessor
from train_jax.core.data_source import Batch, DataSource, Lengths
from train_jax.core.errors import UserError


class TrimmedRows(DataSource):
    """Rows of a source with the lengths of their texts, which are counted once, when they are first needed.

    The text of a row that cannot be used has the length of the blank row that takes its place.
    """

    def __init__(self, rows: DataSource, records: RecordSource, processor: RowProcessor, lengths: Lengths):
        """Counts nothing yet.

        Args:
          rows: with the arrays of `RowProcessor.text`.
          records: those that `rows` prepares.
          processor: of the texts.
          lengths: `limit` is the number of tokens that the model reads of a row.
        """
        self._rows, self._records, self._processor = rows, records, processor
        self.lengths, self.fingerprint = lengths, rows.fingerprint
        self._counts = np.zeros(len(rows), np.int32)  # 0 where not counted
        self._blank = processor.length("", "")

    @property
    def bad_rows(self) -> Mapping[int, str]:
        """Names of the bad rows counted so far."""
        return self._rows.bad_rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._rows[index]

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the number of text tokens that the model reads of each row, int [n]."""
        for index in indices[self._counts[indices] == 0].tolist():
            self._counts[index] = self._count(index)
        return self._counts[indices]

    def _count(self, index: int) -> int:
        try:
            return self._processor.length(*self._records.texts(index))
        except (UserError, OSError):  # a bad row, which is reported when it is read
            return self._blank

    def trim(self, batch: Batch, length: int) -> Batch:
        """Returns a batch [n, ...] with room for `length` tokens beside the last target.

        Raises:
          UserError: a row has more tokens, so that it has changed since they were counted.
        """
        if batch["mask_input"][:, length + 1 :].any():
            raise UserError(
                f"a training row has more than the {length} tokens that were counted before, expected data that do not "
                "change while they are read: start again, or set data.buckets=0"
            )
        return batch | {name: batch[name][:, : length + 1] for name in ("tokens", *MASKS)}

    def on_rows(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows of a batch, see GuardedSource."""
        self._rows.on_rows(np.asarray(indices), np.asarray(bad))

    def check(self) -> None:
        """Checks the share of bad rows, see GuardedSource."""
        self._rows.check()
