"""Ctrl-C and SIGTERM: the run finishes its step and saves its state, so that the same command resumes it."""

import signal
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context manager that turns the first signal into a request; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self._signal: int | None = None
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def requested(self, agree: bool) -> bool:
        """Returns whether to stop now.

        Args:
          agree: with several processes, exchange signals so that all stop at the same step. All processes must pass
            the same value; without it the answer is False.
        """
        if jax.process_count() == 1:
            return self._signal is not None
        if not agree:
            return False
        signals = np.asarray(multihost_utils.process_allgather(np.int32(self._signal or 0)))
        self._signal = int(signals.max()) or None
        return self._signal is not None

    def leave(self, saved: int | None) -> NoReturn:
        """Prints the last saved step and exits with status 128 + signal; call it after `requested` returned True."""
        assert self._signal is not None, "there was no signal"
        if jax.process_index() == 0:
            state = "nothing was saved yet" if saved is None else f"saved at step {saved}"
            print(f"interrupted: {state}; run the same command to resume.", flush=True)
        sys.exit(128 + self._signal)
