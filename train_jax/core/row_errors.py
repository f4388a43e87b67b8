"""What becomes of rows of the training data that cannot be used: told by name, counted, and judged by their share."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from train_jax.core.errors import UserError


class BadRow(UserError):
    """One row of a data set cannot be used (corrupt image, malformed line); the message names the row."""


class BadRows:
    """The bad rows of a source, which keep their slot with weight 0 (see train_jax.data.pipeline.Source).

    Reading only meets them (`skip`), since worker processes may do it, each with a copy; whoever takes their examples
    counts them (`count`). Their share among those counted so far is judged once `MIN_BAD` of them were met, and when as
    many rows were counted as the source has; `check` judges at any time. Threads may call all of it; it can be pickled.

    Args:
      size: rows of the source.
      on_error: "skip" as described, "raise" to stop at the first bad row.
      max_bad_fraction: largest share of bad rows that is tolerated, 0 to 1.
      policies: what to do instead, "skip" or "raise", for some kinds of error.

    Raises:
      UserError: an unknown `on_error`, or a share outside 0 to 1.
    """

    MIN_BAD = 20
    NAMES_IN_MESSAGE = 3

    def __init__(
        self,
        size: int,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
        policies: Mapping[type[Exception], str] | None = None,
    ):
        if on_error not in ("skip", "raise"):
            raise UserError(f"data.on_error is {on_error!r}, expected 'skip' or 'raise'; choose one of them.")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {max_bad_fraction}, expected a share from 0 to 1; change it.")
        self.on_error, self.max_bad_fraction = on_error, max_bad_fraction
        self.seen, self.bad = 0, 0  # rows counted
        self._size, self._policies = size, dict(policies or {})
        self._lock = threading.Lock()
        self._told: set[int] = set()  # rows whose fault was logged
        self._names: dict[int, str] = {}  # row number -> name, in the order counted

    def skip(self, index: int, name: str, error: Exception) -> None:
        """Logs a bad row, once in this process. Raises the error itself where that is the policy."""
        policies = (policy for kind, policy in self._policies.items() if isinstance(error, kind))
        if next(policies, self.on_error) == "raise":
            raise error
        with self._lock:
            new = index not in self._told
            self._told.add(index)
        if new:
            logging.warning("Bad row %d (%s) skipped with weight 0: %s", index, name, error)

    def count(
        self,
        indices: Sequence[int] | np.ndarray,
        bad: Sequence[bool | np.bool_] | np.ndarray,
        name_of: Callable[[int], str],
    ) -> None:
        """Counts rows that were read, here or by a copy: their numbers, and which of them were bad.

        `name_of` is asked for the name of a bad row that is new. Raises UserError as `check`, where the share is to be
        judged.
        """
        for index, marked in zip(map(int, indices), bad, strict=True):
            name = name_of(index) if marked and index not in self._names else None
            with self._lock:
                self.seen += 1
                self.bad += bool(marked)
                if name is not None:
                    self._names[index] = name
                due = marked and self.bad >= self.MIN_BAD or self.seen == self._size
            if due:
                self.check()

    @property
    def names(self) -> dict[int, str]:
        """Name by row number of the bad rows counted so far, in that order; a row counted twice stands once."""
        with self._lock:
            return dict(self._names)

    def check(self) -> None:
        """Judges the share of bad rows among all counted so far; call it at the end of a pass.

        Raises:
          UserError: the share is exceeded, with count, share and the first names.
        """
        with self._lock:
            seen, bad, names = self.seen, self.bad, list(self._names.values())
        if bad > self.max_bad_fraction * seen:
            first = ", ".join(names[: self.NAMES_IN_MESSAGE])
            raise UserError(
                f"{bad} of {seen} rows read were bad ({bad / seen:.1%}; first: {first}), expected at most "
                f"{self.max_bad_fraction:.1%}; mend the data or raise data.max_bad_fraction."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
