"""Detects a full disk in errors of other libraries."""

import errno
import logging


def is_full(error: BaseException | None) -> bool:
    """Returns whether the error or one of its causes reports that no space or quota is left.

    TensorStore reports it only in the message of a ValueError.
    """
    if error is None:
        return False
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    return is_full(error.__cause__ or error.__context__)


def is_other_than_full(record: logging.LogRecord) -> bool:
    """A logging filter that drops tracebacks of a full disk, for callers that report it in one sentence."""
    return not (record.exc_info and is_full(record.exc_info[1]))
