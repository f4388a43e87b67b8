"""Exceptions that are printed as one line without a traceback, and helpers for their messages."""

import traceback
from pathlib import Path


class UserError(ValueError):
    """A mistake in the user's input.

    The message is one sentence that says what was found, what was expected and what to change. `train.py`, `eval.py`
    and `predict.py` print it without a traceback and exit with status 2; other exceptions keep their traceback.
    """

    exit_status = 2


class RunStopped(UserError):
    """A run that cannot continue, because of non-finite updates for example; exit status 1."""

    exit_status = 1


def located(error: Exception) -> str:
    """Returns an error as one line with the innermost line of code, such as "task.py, line 12: NameError: ..."."""
    frames = traceback.extract_tb(error.__traceback__)
    file, line = (frames[-1].filename, frames[-1].lineno) if frames else ("", None)
    if isinstance(error, SyntaxError):
        file, line = error.filename or "", error.lineno
    text = " ".join(str(error.args[0] if error.args else error).split())
    return f"{Path(file).name}, line {line}: {type(error).__name__}: {text}"


def cut(text: str, most: int = 80) -> str:
    """Shortens a text for a message: its first `most` characters, followed by its length if it is longer."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def listed(names: list[str], most: int = 8) -> str:
    """Formats the first names of a list and the number of the others."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(value: object, most: int = 80) -> str:
    """Returns the `repr` of a value for a message, shortened to about `most` characters."""
    if isinstance(value, str | bytes) and len(value) > most:
        return f"{value[:most]!r}... ({len(value):,} {'bytes' if isinstance(value, bytes) else 'characters'})"
    try:
        return cut(repr(value), most + 2)  # two more for the quotation marks
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to be shown"
