"""Ctrl-C and SIGTERM: the step is finished, the state saved, and the same command resumes."""

import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context manager that turns the first signal into a request; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self._signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def requested(self, agree: bool) -> bool:
        """Whether to stop now. Several processes agree only where all of them ask with `agree` (at a log step)."""
        if jax.process_count() == 1:
            return self._signal is not None
        if not agree:
            return False
        votes = multihost_utils.process_allgather(np.int32(self._signal or 0))
        self._signal = int(votes.max()) or None
        return self._signal is not None

    def leave(self, saved: int | None) -> None:
        """Ends the process with the status a shell expects of that signal, after telling the step last saved."""
        if jax.process_index() == 0:
            found = "nothing was saved yet" if saved is None else f"saved at step {saved}"
            print(f"interrupted: {found}; run the same command to resume.", flush=True)
        sys.exit(128 + self._signal)
