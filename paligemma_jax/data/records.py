"""The one record that every data source yields, seeded subsets of a source, and the policy for bad rows.

A source is a random-access sequence: the loop turns a step into indices, so resuming is arithmetic and a row that
cannot be used must keep its slot. `GuardedSource` sees to that: it owns the step from record to arrays, where decoding
happens, and hands out a blank example of weight 0 in place of one that failed.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError, quoted
from train_jax.core.row_errors import BadRow, BadRows

__all__ = [
    "BadRow",
    "GuardedSource",
    "Record",
    "Source",
    "Subset",
    "blank_record",
    "checked_index",
    "fingerprint_of",
    "prompt_checked",
    "spread",
    "suffix_of",
]


@dataclasses.dataclass(frozen=True)
class Record:
    """One training or evaluation example, image still encoded.

    Attributes:
      image: bytes of a PNG or JPEG file.
      image_name: name for people and for joins, such as `CLEVR_val_000012.png`.
      image_index: identity of the image within its source, 0 or more; rows with images of equal bytes share it.
      prefix: the prompt, as the model sees it before the separator.
      suffix: the answer; empty where none is known (CLEVR's test split).
      weight: 1 for a row that counts, 0 for one that only keeps its slot.
    """

    image: bytes
    image_name: str
    image_index: int
    prefix: str
    suffix: str
    weight: float = 1.0


@runtime_checkable  # so that beartype can check it in tests
class Source(Protocol):
    """Random access to records. `fingerprint` is a stable hash of what the rows are and of their order.

    `source[i]` raises `BadRow` (or `OSError`) when row i cannot be read and `IndexError` past the end. Sources are
    read by several threads at once and are pickled when worker processes read them.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def image_numbers(self) -> np.ndarray:
        """`image_index` of every row, int [rows], without reading any."""
        ...


def fingerprint_of(**identity: Any) -> str:
    """Sixteen hexadecimal digits, equal if and only if the JSON-serialisable keyword values are equal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def checked_index(index: int, length: int) -> int:
    """`index` as a plain non-negative int; counts from the end when negative, as lists do. Raises IndexError."""
    position = int(index) + (length if index < 0 else 0)
    if not 0 <= position < length:
        raise IndexError(f"row {index} of a source with {length} rows")
    return position


def prompt_checked(prompt: str) -> str:
    """A prompt template after checking that it says where the question goes. Raises UserError."""
    if "{question}" not in prompt:
        raise UserError(
            f"the prompt {quoted(prompt)} has no place for the question, expected text such as 'answer en "
            "{question}'; put {question} into it."
        )
    return prompt


class Subset:
    """Some rows of a source: a seeded random fraction of them, or an explicit list of indices.

    A fraction takes the first `round(fraction * len(source))` rows (at least one) of a permutation drawn from `seed`,
    so with one seed the smaller fraction is the beginning of the larger one. The permutation sorts the raw 64-bit
    outputs of numpy's PCG64, which numpy keeps stable across releases. It is not the permutation of Hugging Face's
    `datasets` library: seed 42 here and there select different rows.

    Args:
      source: the rows to choose from; the choice is over rows, that is over questions, not over images.
      fraction: share of the rows, in (0, 1]; exactly one of `fraction` and `indices` must be given.
      indices: row numbers in the order wanted, each within the source.
      seed: of the permutation.

    Raises:
      UserError: if neither or both are given, if the fraction or an index is out of range, or nothing is chosen.
    """

    def __init__(
        self,
        source: Source,
        fraction: float | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        seed: int = 42,
    ):
        if (fraction is None) == (indices is None):
            raise UserError("a subset got both or neither of fraction and indices, expected exactly one; remove one.")
        if indices is None:
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
        """`image_index` of every row, without reading any."""
        return self.source.image_numbers()[self.indices]

    def suffix(self, index: int) -> str:
        """The suffix of a row, see `suffix_of`."""
        return suffix_of(self.source, int(self.indices[checked_index(index, len(self))]))


def suffix_of(source: Source, index: int) -> str:
    """The suffix of a row, its image unread where the source has a method `suffix`. Raises as `source[index]`."""
    own = getattr(source, "suffix", None)
    return source[index].suffix if own is None else own(index)


def spread(source: Source, most: int | None) -> Source:
    """At most so many rows (None: all), evenly spread over a source, whose order may mean something."""
    if most is None or most >= len(source):
        return source
    step = len(source) / most
    return Subset(source, indices=[int(row * step) for row in range(most)])


def blank_record() -> Record:
    """A black one-pixel image with empty texts and weight 0: fills the slot of a row that cannot be used."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return Record(buffer.getvalue(), "", 0, "", "", weight=0.0)


class GuardedSource(DataSource):
    """Prepared examples of a source, with bad rows logged by name and replaced by weight 0, to be counted.

    A row is bad when reading or preparing it raises `UserError` (of which `BadRow` is one) or `OSError`; any other
    exception is a fault of the program and passes through. They are counted and judged as `BadRows` says.

    Args:
      source: records to prepare.
      prepare: turns a record into a dict of numpy arrays, decoding the image; must accept `placeholder`.
      on_error, max_bad_fraction, policies: see `BadRows`.
      placeholder: the record prepared in place of a bad one.

    Raises:
      UserError: for an unknown `on_error` or a share outside 0 to 1; while counting, when the share is exceeded; under
        "raise", the first bad row's own error, while reading.
    """

    def __init__(
        self,
        source: Source,
        prepare: Callable[[Record], dict[str, Any]],
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
        placeholder: Record | None = None,
        policies: Mapping[type[Exception], str] | None = None,
    ):
        self.source = source
        self.prepare = prepare
        self.tally = BadRows(len(source), on_error, max_bad_fraction, policies)
        self._placeholder = dataclasses.replace(placeholder or blank_record(), weight=0.0)

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The prepared example; where the row was bad, `weight` (float32 scalar) is 0 and `bad` (bool scalar) True."""
        index = checked_index(index, len(self))
        record, bad = None, False
        try:
            record = self.source[index]
            example, weight = self.prepare(record), record.weight
        except (UserError, OSError) as error:
            self.tally.skip(index, record.image_name if record else f"row {index}", error)
            example, weight, bad = self.prepare(self._placeholder), 0.0, True
        return {**example, "weight": np.float32(weight), "bad": np.bool_(bad)}

    def on_rows(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows that were read, see `BadRows`; a bad row that is new is looked up for its name."""
        self.tally.count(indices, bad, self._name)

    @property
    def bad_rows(self) -> dict[int, str]:
        """Name by row number of the bad rows counted so far."""
        return self.tally.names

    def check(self) -> None:
        """Judges the share of bad rows among all counted so far. Raises UserError."""
        self.tally.check()

    def _name(self, index: int) -> str:
        """The name of a bad row, where it can be read as far as that."""
        try:
            return self.source[index].image_name
        except (UserError, OSError):
            return f"row {index}"
