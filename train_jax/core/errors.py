"""Exceptions that are printed as one line without a traceback, and helpers for their messages."""


class UserError(ValueError):
    """A mistake in the user's input.

    The message is one sentence that says what was found, what was expected and what to change. `train.py`, `eval.py`
    and `predict.py` print it without a traceback and exit with status 2; other exceptions keep their traceback.
    """

    exit_status = 2


class RunStopped(UserError):
    """A run that cannot continue, because of non-finite updates for example; exit status 1."""

    exit_status = 1


def cut(text: str, most: int = 80) -> str:
    """Shortens a text for a message: its first `most` characters, followed by its length if it is longer."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def quoted(value: object, most: int = 80) -> str:
    """Returns the `repr` of a value for a message, shortened to about `most` characters."""
    if isinstance(value, str | bytes) and len(value) > most:
        return f"{value[:most]!r}... ({len(value):,} {'bytes' if isinstance(value, bytes) else 'characters'})"
    try:
        return cut(repr(value), most + 2)  # two more for the quotation marks
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to be shown"
