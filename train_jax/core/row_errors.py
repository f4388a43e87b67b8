"""Rows of the training data that cannot be used: logged by name, counted, and limited to a fraction of all rows."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from train_jax.core.errors import UserError


class BadRow(UserError):
    """A row of a data set cannot be used (corrupt image, malformed line); the message names the row."""


class BadRows:
    """Counts the bad rows of a source, which keep their index with weight 0 (see data_source.DataSource).

    `skip` is called where a row is read, possibly in a worker process with a copy of this object; `count` is called
    where its batch is used. The fraction of bad rows is checked from the `MIN_BAD`-th bad row on, and once as many rows
    were counted as the source has. Thread-safe and picklable.

    Args:
      size: rows of the source.
      on_error: "skip" as described, or "raise" to stop at the first bad row.
      max_bad_fraction: largest allowed fraction of bad rows, 0 to 1.
      policies: "skip" or "raise" for certain types of error, instead of `on_error`.

    Raises:
      UserError: `on_error` is unknown, or the fraction is not in 0 to 1.
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
        self._logged: set[int] = set()  # indices
        self._names: dict[int, str] = {}  # index -> name, in the order counted

    def skip(self, index: int, name: str, error: Exception) -> None:
        """Logs a bad row, once in this process; raises `error` if the policy for its type is "raise"."""
        policies = (policy for kind, policy in self._policies.items() if isinstance(error, kind))
        if next(policies, self.on_error) == "raise":
            raise error
        with self._lock:
            new = index not in self._logged
            self._logged.add(index)
        if new:
            logging.warning("Bad row %d (%s) skipped with weight 0: %s", index, name, error)

    def count(
        self,
        indices: Sequence[int] | np.ndarray,
        bad: Sequence[bool | np.bool_] | np.ndarray,
        name_of: Callable[[int], str],
    ) -> None:
        """Counts rows, and checks the fraction of bad ones when it is due.

        Args:
          indices: int [n], indices of the rows.
          bad: bool [n], which of them are bad.
          name_of: returns the name of a row; called once for each bad row.

        Raises:
          UserError: as `check`.
        """
        for index, is_bad in zip(map(int, indices), bad, strict=True):
            name = name_of(index) if is_bad and index not in self._names else None
            with self._lock:
                self.seen += 1
                self.bad += bool(is_bad)
                if name is not None:
                    self._names[index] = name
                due = is_bad and self.bad >= self.MIN_BAD or self.seen == self._size
            if due:
                self.check()

    @property
    def names(self) -> dict[int, str]:
        """{index: name} of the bad rows counted so far, in order; a row counted twice is listed once."""
        with self._lock:
            return dict(self._names)

    def check(self) -> None:
        """Checks the fraction of bad rows among all counted rows; call it at the end of a pass.

        Raises:
          UserError: the fraction is too large; the message has counts, the fraction and the first names.
        """
        with self._lock:
            seen, bad, names = self.seen, self.bad, list(self._names.values())
        if bad > self.max_bad_fraction * seen:
            first = ", ".join(names[: self.NAMES_IN_MESSAGE])
            raise UserError(
                f"{bad} of {seen} rows read were bad ({bad / seen:.1%}; first: {first}), expected at most "
                f"{self.max_bad_fraction:.1%}; correct the data or raise data.max_bad_fraction."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
