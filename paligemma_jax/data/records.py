"""The record that every data source yields, seeded subsets of a source, and the handling of bad rows.

A source is a random-access sequence: the training loop computes row indices from the step, so a resumed run needs no
reader state, and a row that cannot be used must keep its place. `GuardedSource` prepares records (it decodes images)
and returns a blank example of weight 0 in place of a row that fails.
"""

import abc
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError, quoted
from train_jax.core.row_errors import BadRow, BadRows

__all__ = [
    "BadRow",
    "GuardedSource",
    "Record",
    "RecordSource",
    "Subset",
    "blank_record",
    "checked_index",
    "evenly_spaced",
    "fingerprint_of",
    "prompt_checked",
]


@dataclasses.dataclass(frozen=True)
class Record:
    """One training or evaluation example, with its image still encoded.

    Attributes:
      image: bytes of a PNG or JPEG file.
      image_name: name of the image in messages and results, such as `CLEVR_val_000012.png`.
      image_index: number of the image within its source, 0 or more; rows whose images have equal bytes share it.
      prefix: the prompt, as the model reads it before the separator.
      suffix: the answer; empty if unknown (CLEVR's test split).
      weight: 1 for a row that counts in metrics, 0 for a row that only keeps its place.
    """

    image: bytes
    image_name: str
    image_index: int
    prefix: str
    suffix: str
    weight: float = 1.0


class RecordSource(abc.ABC):
    """Random access to records.

    `source[i]` raises `BadRow` (or `OSError`) if row i cannot be read, and `IndexError` past the end. Sources are read
    by several threads at once, and are pickled to be read by worker processes.

    Attributes:
      fingerprint: a stable hash of the rows and their order.
    """

    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @abc.abstractmethod
    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, int [rows], without reading any row."""

    def texts(self, index: int) -> tuple[str, str]:
        """Returns prefix and suffix of a row; raises as `source[index]`. Override it if the image need not be read."""
        record = self[index]
        return record.prefix, record.suffix

    def suffix(self, index: int) -> str:
        """Returns the suffix of a row, as `texts` does; override it if it takes less to read than both."""
        return self.texts(index)[1]


def fingerprint_of(**identity: Any) -> str:
    """Returns 16 hexadecimal digits that are equal if and only if the JSON-serialisable keyword values are."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def checked_index(index: int, length: int) -> int:
    """Returns `index` as a non-negative int; negative ones count from the end, as in lists. Raises IndexError."""
    position = int(index) + (length if index < 0 else 0)
    if not 0 <= position < length:
        raise IndexError(f"row {index} of a source with {length} rows")
    return position


def prompt_checked(prompt: str) -> str:
    """Returns a prompt template after checking that it contains {question}. Raises UserError."""
    if "{question}" not in prompt:
        raise UserError(
            f"the prompt {quoted(prompt)} has no place for the question, expected text such as 'answer en "
            "{question}'; put {question} into it."
        )
    return prompt


class Subset(RecordSource):
    """Some rows of a source: a seeded random fraction of them, or an explicit list of indices.

    A fraction takes the first `round(fraction * len(source))` rows (at least one) of a permutation drawn from `seed`,
    so with one seed a smaller fraction is contained in a larger one. The permutation sorts the raw 64-bit outputs of
    numpy's PCG64, which numpy keeps stable across releases. It is not the permutation of Hugging Face's `datasets`
    library: seed 42 here and there selects different rows.

    Args:
      source: the rows to choose from; the fraction is of rows (questions), not of images.
      fraction: share of the rows, in (0, 1]; exactly one of `fraction` and `indices` must be given.
      indices: row numbers in the order of the subset, each within the source.
      seed: of the permutation.

    Raises:
      UserError: if neither or both are given, if the fraction or an index is out of range, or if no row is chosen.
    """

    def __init__(
        self,
        source: RecordSource,
        fraction: float | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        seed: int = 42,
    ):
        if (fraction is None) == (indices is None):
            raise UserError("a subset got both or neither of fraction and indices, expected exactly one; remove one.")
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise UserError(f"the data fraction is {fraction}, expected above 0 and at most 1; change it.")
            order = np.argsort(np.random.PCG64(seed).random_raw(len(source)), kind="stable")
            chosen = order[: max(1, round(fraction * len(source)))]
        else:
            chosen = np.asarray(indices, np.int64).reshape(-1)
            if chosen.size and (chosen.min() < 0 or chosen.max() >= len(source)):
                raise UserError(
                    f"a subset's indices span {chosen.min()} to {chosen.max()}, expected 0 to {len(source) - 1}; "
                    "leave out those beyond the source."
                )
        if not chosen.size:
            raise UserError(
                "a subset holds no rows, expected at least one; give a source or indices that are not empty."
            )
        self.source = source
        self.indices = chosen
        rows = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        self.fingerprint = fingerprint_of(source=source.fingerprint, rows=rows)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[checked_index(index, len(self))])]

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, without reading any row."""
        return self.source.image_numbers()[self.indices]

    def texts(self, index: int) -> tuple[str, str]:
        """Returns prefix and suffix of a row."""
        return self.source.texts(int(self.indices[checked_index(index, len(self))]))

    def suffix(self, index: int) -> str:
        """Returns the suffix of a row."""
        return self.source.suffix(int(self.indices[checked_index(index, len(self))]))


def evenly_spaced(source: RecordSource, most: int | None) -> RecordSource:
    """Returns at most `most` rows (None: all), evenly spaced over the source, whose order may be meaningful."""
    if most is None or most >= len(source):
        return source
    step = len(source) / most
    return Subset(source, indices=[int(row * step) for row in range(most)])


def blank_record() -> Record:
    """Returns a black one-pixel image with empty texts and weight 0, in place of a row that cannot be used."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return Record(buffer.getvalue(), "", 0, "", "", weight=0.0)


class GuardedSource(DataSource):
    """Prepared examples of a source; bad rows are logged by name, counted, and replaced by examples of weight 0.

    A row is bad if reading or preparing it raises `UserError` (`BadRow` is one) or `OSError`; any other exception is a
    fault of the program and is raised. `BadRows` documents how bad rows are counted and when they stop a run.

    Args:
      source: records to prepare.
      prepare: turns a record into a dict of numpy arrays, decoding the image; must accept `placeholder`.
      on_error, max_bad_fraction, policies: see `BadRows`.
      placeholder: the record that is prepared in place of a bad one.

    Raises:
      UserError: for an unknown `on_error` or a share outside 0 to 1; while counting, if the share is exceeded; with
        "raise", the first bad row's own error, while reading.
    """

    def __init__(
        self,
        source: RecordSource,
        prepare: Callable[[Record], dict[str, Any]],
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
        placeholder: Record | None = None,
        policies: Mapping[type[Exception], str] | None = None,
    ):
        self.source = source
        self.prepare = prepare
        self.bad_row_counts = BadRows(len(source), on_error, max_bad_fraction, policies)
        self._placeholder = dataclasses.replace(placeholder or blank_record(), weight=0.0)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the prepared example; for a bad row `weight` (float32 scalar) is 0 and `bad` (bool scalar) True."""
        index = checked_index(index, len(self))
        record, bad = None, False
        try:
            record = self.source[index]
            example, weight = self.prepare(record), record.weight
        except (UserError, OSError) as error:
            self.bad_row_counts.skip(index, record.image_name if record else f"row {index}", error)
            example, weight, bad = self.prepare(self._placeholder), 0.0, True
        return {**example, "weight": np.float32(weight), "bad": np.bool_(bad)}

    def on_rows(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows that were read, see `BadRows`; new bad rows are read again for their names."""
        self.bad_row_counts.count(indices, bad, self._name)

    @property
    def bad_rows(self) -> dict[int, str]:
        """Names of the bad rows counted so far, by row number."""
        return self.bad_row_counts.names

    def check(self) -> None:
        """Raises UserError if too large a share of the rows counted so far is bad."""
        self.bad_row_counts.check()

    def _name(self, index: int) -> str:
        """Returns the name of a bad row if it can be read, else its number."""
        try:
            return self.source[index].image_name
        except (UserError, OSError):
            return f"row {index}"
