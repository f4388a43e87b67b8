"""How a full disk shows itself in errors of other libraries."""

import errno
import logging


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, says that no space (or quota) is left.

    TensorStore tells it in words alone, inside a ValueError.
    """
    if error is None:
        return False
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    return is_full(error.__cause__ or error.__context__)


def is_other_than_full(record: logging.LogRecord) -> bool:
    """A logging filter that holds back tracebacks about a full disk, for a caller who tells of it in a sentence."""
    return not (record.exc_info and is_full(record.exc_info[1]))
