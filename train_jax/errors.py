"""The exceptions that a person can act on: printed as one line, no traceback."""


class UserError(ValueError):
    """A mistake in the input, not in the program.

    The message is one sentence that says what was found, what was expected and what to change. `train.py`, `eval.py`
    and `predict.py` print it without a traceback and exit with status 2; every other exception keeps its traceback.
    """

    exit_status = 2


class RunStopped(UserError):
    """A run that could not go on (non-finite updates, say), told in one sentence; exit status 1."""

    exit_status = 1
