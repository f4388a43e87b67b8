"""The one record that every data source yields, seeded subsets of a source, and the policy for bad rows.

A source is a random-access sequence: the loop turns a step into indices, so resuming is arithmetic and a row that
cannot be used must keep its slot. `GuardedSource` sees to that: it owns the step from record to arrays, where decoding
happens, and hands out a blank example of weight 0 in place of one that failed.
"""

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from PIL import Image

from train_jax.errors import UserError


class BadRow(UserError):
    """One row of a data set cannot be used (corrupt image, malformed line); the message names the row."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One training or evaluation example, image still encoded.

    Attributes:
      image: bytes of a PNG or JPEG file.
      image_name: name for people and for joins, such as `CLEVR_val_000012.png`.
      image_index: identity of the image within its source, 0 or more; questions on one image share it.
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
            f"the prompt {prompt!r} has no place for the question, expected text such as 'answer en {{question}}'; "
            "put {question} into it."
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


def blank_record() -> Record:
    """A black one-pixel image with empty texts and weight 0: fills the slot of a row that cannot be used."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return Record(buffer.getvalue(), "", 0, "", "", weight=0.0)


class GuardedSource:
    """Prepared examples of a source, with bad rows logged by name and replaced by weight 0, to be counted.

    A row is bad when reading or preparing it raises `UserError` (of which `BadRow` is one) or `OSError`; any other
    exception is a fault of the program and passes through. Reading only marks a bad row, since worker processes may do
    it, each with a copy of the source; whoever takes their examples in `count`s them. The share of bad rows among those
    counted so far is judged once `MIN_BAD` of them were met, and when as many rows were counted as the source has;
    `check` judges at any time.

    Args:
      source: records to prepare.
      prepare: turns a record into a dict of numpy arrays, decoding the image; must accept `placeholder`.
      on_error: "skip" as described, "raise" to stop at the first bad row.
      policies: what to do instead, "skip" or "raise", for some kinds of error.
      max_bad_fraction: largest share of bad rows that is tolerated, 0 to 1.
      placeholder: the record prepared in place of a bad one.

    Raises:
      UserError: for an unknown `on_error` or a share outside 0 to 1; while counting, when the share is exceeded, with
        count, share and the first names; under "raise", the first bad row's own error, while reading.
    """

    MIN_BAD = 20
    NAMES_IN_MESSAGE = 3

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
        if on_error not in ("skip", "raise"):
            raise UserError(f"data.on_error is {on_error!r}, expected 'skip' or 'raise'; choose one of them.")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {max_bad_fraction}, expected a share from 0 to 1; change it.")
        self.source = source
        self.prepare = prepare
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        self.policies = dict(policies or {})
        self.fingerprint = source.fingerprint
        self._placeholder = dataclasses.replace(placeholder or blank_record(), weight=0.0)
        self._lock = threading.Lock()
        self._told: set[int] = set()  # rows whose fault was logged
        self._seen = 0
        self._bad = 0
        self._bad_rows: dict[int, str] = {}  # row number -> name, in the order counted

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The prepared example; where the row was bad, `weight` (float32 scalar) is 0 and `bad` (bool scalar) True."""
        index = checked_index(index, len(self))
        record, failure = None, None
        try:
            record = self.source[index]
            example, weight = self.prepare(record), record.weight
        except (UserError, OSError) as error:
            if self._policy(error) == "raise":
                raise
            example, weight, failure = self.prepare(self._placeholder), 0.0, error
            self._tell(index, record, error)
        return {**example, "weight": np.float32(weight), "bad": np.bool_(failure is not None)}

    def count(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows that were read, here or by a copy: their numbers, and which of them were marked.

        A bad row that is new is looked up for its name. Raises UserError as `check`, where the share is to be judged.
        """
        for index, marked in zip(map(int, indices), bad, strict=True):
            name = self._name(index) if marked and index not in self._bad_rows else None
            with self._lock:
                self._seen += 1
                self._bad += bool(marked)
                if name is not None:
                    self._bad_rows[index] = name
                due = marked and self._bad >= self.MIN_BAD or self._seen == len(self)
            if due:
                self.check()

    @property
    def bad_rows(self) -> dict[int, str]:
        """Name by row number of the bad rows counted so far, in that order; a row counted twice stands once."""
        with self._lock:
            return dict(self._bad_rows)

    def check(self) -> None:
        """Judges the share of bad rows among all counted so far; call it at the end of a pass. Raises UserError."""
        with self._lock:
            seen, bad, names = self._seen, self._bad, list(self._bad_rows.values())
        if bad > self.max_bad_fraction * seen:
            first = ", ".join(names[: self.NAMES_IN_MESSAGE])
            raise UserError(
                f"{bad} of {seen} rows read were bad ({bad / seen:.1%}; first: {first}), expected at most "
                f"{self.max_bad_fraction:.1%}; mend the data or raise data.max_bad_fraction."
            )

    def _policy(self, error: Exception) -> str:
        return next((policy for kind, policy in self.policies.items() if isinstance(error, kind)), self.on_error)

    def _tell(self, index: int, record: Record | None, failure: Exception) -> None:
        """Logs a bad row, once in this process."""
        with self._lock:
            new = index not in self._told
            self._told.add(index)
        if new:
            name = record.image_name if record else f"row {index}"
            logging.warning("Bad row %d (%s) skipped with weight 0: %s", index, name, failure)

    def _name(self, index: int) -> str:
        """The name of a bad row, where it can be read as far as that."""
        try:
            return self.source[index].image_name
        except (UserError, OSError):
            return f"row {index}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
