import errno
import logging
import sys

import pytest

from train_jax.system import disk


def chain(first):
    """Returns an error raised while `first` was handled, as in libraries."""
    try:
        try:
            raise first
        except Exception as error:
            raise RuntimeError("save failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"), True),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), False),
    ],
)
def test_a_full_disk_is_recognized_by_errno_or_message(error, full):
    assert disk.is_full(error) is full
    assert disk.is_full(chain(error)) is full


def test_the_filter_drops_only_tracebacks_of_a_full_disk():
    def record(error):
        try:
            raise error
        except Exception:
            return logging.LogRecord("absl", logging.ERROR, "f", 1, "failed", (), sys.exc_info())

    assert not disk.is_other_than_full(record(OSError(errno.ENOSPC, "x")))
    assert disk.is_other_than_full(record(OSError(errno.EACCES, "x")))
    assert disk.is_other_than_full(logging.LogRecord("absl", logging.ERROR, "f", 1, "failed", (), None))
