"""The one exception that means "the user can mend this": printed as one line, exit status 2, no traceback."""


class UserError(ValueError):
    """A mistake in the input, not in the program.

    The message is one sentence that says what was found, what was expected and what to change. `train.py`, `eval.py`
    and `predict.py` print it without a traceback and exit with status 2; every other exception keeps its traceback.
    """
