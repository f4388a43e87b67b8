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


def cut(text: str, most: int = 80) -> str:
    """A text as a message holds it: its first characters, and how many it has, where it is longer than `most`."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def quoted(value: object, most: int = 80) -> str:
    """A value of a user's as a message quotes it: as Python writes it, which spells out half characters, and cut."""
    if isinstance(value, str | bytes) and len(value) > most:
        return f"{value[:most]!r}... ({len(value):,} {'bytes' if isinstance(value, bytes) else 'characters'})"
    try:
        return cut(repr(value), most + 2)  # with the marks of a text that is as long as may be
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to be shown"
