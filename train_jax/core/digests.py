"""What a file is, whatever its name: a digest of its bytes, computed once and kept until its size or time change.

Two files of one name may differ and two of different names be the same, so where things are shared, cached or kept
apart they go by these.
"""

import hashlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8
from tqdm import tqdm

from train_jax.core.files import atomic

SIZE = 16  # bytes of a digest
_THREADS = 4
_STATE = "state_of_the_files"  # name of an array of a kept file


def digest(data: bytes | None) -> bytes:
    """`SIZE` bytes, equal for equal data; zeros for none, or for no bytes, which are nothing that could be the same."""
    return hashlib.blake2b(data, digest_size=SIZE).digest() if data else bytes(SIZE)


def of_files(files: Sequence[str | Path], place: Path | None = None, what: str = "files") -> UInt8[np.ndarray, "N 16"]:
    """The digest of each file, zeros where it cannot be read.

    Args:
      files: to read.
      place: where the digests are kept, see `kept`.
      what: they are, for a progress bar.
    """

    def compute() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = tqdm(pool.map(_of_file, files), f"Reading {what}", len(files), disable=not sys.stderr.isatty())
            return {"digests": stacked(list(found))}

    return kept(place, files, compute)["digests"]


def _of_file(file: str | Path) -> bytes:
    try:
        return digest(Path(file).read_bytes())
    except (OSError, ValueError):  # a name that no file can have
        return digest(None)


def stacked(digests: Sequence[bytes]) -> UInt8[np.ndarray, "N 16"]:
    """Digests as an array."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SIZE)


def keys(digests: UInt8[np.ndarray, "N 16"]) -> list[bytes | None]:
    """Digests one by one, None for zeros; for `numbers`."""
    return [row if any(row) else None for row in map(bytes, digests)]


def numbers(keys: Iterable[Hashable]) -> Int32[np.ndarray, " N"]:
    """A number for every key, from 0 in order of appearance, the same for equal ones; None is equal to nothing."""
    found: dict[Hashable, int] = {}
    unlike = object()
    pairs = (((unlike, row) if key is None else key) for row, key in enumerate(keys))
    return np.array([found.setdefault(key, len(found)) for key in pairs], np.int32)


def kept(
    place: Path | None, files: Sequence[str | Path], compute: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """What `compute` makes of files, read from `place` while their names, sizes and times are what they were.

    Args:
      place: an .npz, written where it can be; None: nothing is kept.
      files: what the arrays are computed from.
      compute: called without what is kept, or with what is kept of other files.
    """
    state = np.frombuffer(hashlib.blake2b("\n".join(map(_state, files)).encode("utf-8", "replace")).digest(), np.uint8)
    if place is not None and place.is_file():
        try:
            with np.load(place, allow_pickle=False) as stored:
                if np.array_equal(stored[_STATE], state):
                    return {name: stored[name] for name in stored.files if name != _STATE}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s cannot be read (%s) and is made again.", place, error)
    arrays = compute()
    if place is not None:
        _save(place, {**arrays, _STATE: state})
    return arrays


def _state(file: str | Path) -> str:
    """Name, size and time of a file."""
    try:
        status = Path(file).stat()
    except (OSError, ValueError):
        return f"{file} is not there"
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def _save(place: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays to an .npz; where that is not possible, the next start computes them again."""
    try:
        with atomic(place) as draft:
            np.savez(draft, **arrays)  # pyright: ignore[reportArgumentType]  (no array is named allow_pickle)
    except OSError as error:
        logging.warning("%s is not kept (%s); it is computed again at the next start.", place, error)


def place_of(cache: str | Path | None, *source: object) -> Path | None:
    """Where in a cache folder the digests of a source are kept; None without one."""
    if cache is None:
        return None
    name = hashlib.blake2b(repr(source).encode("utf-8", "replace"), digest_size=8).hexdigest()
    return Path(cache).expanduser() / "digests" / f"{name}.npz"
