"""One process prepares the data of a folder while others wait."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several processes that want the data of a folder, one prepares them and the others wait (not on Windows)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
