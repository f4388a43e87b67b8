"""Digests of the bytes of files, cached until the size or modification time of a file changes.

Files are identified by digests rather than names: files of the same name may differ, and copies have different names.
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
_STATE = "state_of_the_files"  # name of the array in a cache file that identifies the input files


def digest(data: bytes | None) -> bytes:
    """Returns the digest of data, `SIZE` bytes; zeros for None and for empty data, which count as missing."""
    return hashlib.blake2b(data, digest_size=SIZE).digest() if data else bytes(SIZE)


def of_files(
    files: Sequence[str | Path], cache_file: Path | None = None, what: str = "files"
) -> UInt8[np.ndarray, "N 16"]:
    """Returns the digest of each file; zeros if it cannot be read.

    Args:
      files: paths of the files.
      cache_file: stores the digests, see `kept`.
      what: name of the files in the progress bar.
    """

    def compute() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            results = pool.map(_of_file, files)
            results = tqdm(results, f"Reading {what}", len(files), disable=not sys.stderr.isatty())
            return {"digests": stacked(list(results))}

    return kept(cache_file, files, compute)["digests"]


def _of_file(file: str | Path) -> bytes:
    """Returns the digest of a file; zeros if it cannot be read."""
    try:
        return digest(Path(file).read_bytes())
    except (OSError, ValueError):  # ValueError: the name contains a null byte
        return digest(None)


def stacked(digests: Sequence[bytes]) -> UInt8[np.ndarray, "N 16"]:
    """Stacks digests in an array."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SIZE)


def keys(digests: UInt8[np.ndarray, "N 16"]) -> list[bytes | None]:
    """Returns the rows of an array of digests as bytes, and None for zeros; the input of `numbers`."""
    return [row if any(row) else None for row in map(bytes, digests)]


def numbers(keys: Iterable[Hashable]) -> Int32[np.ndarray, " N"]:
    """Numbers the distinct keys from 0 in order of appearance; every None gets a number of its own."""
    number_of: dict[Hashable, int] = {}
    missing = object()
    unique = ((missing, row) if key is None else key for row, key in enumerate(keys))
    return np.array([number_of.setdefault(key, len(number_of)) for key in unique], np.int32)


def kept(
    cache_file: Path | None, files: Sequence[str | Path], compute: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Returns the arrays of `compute()`, cached while the names, sizes and modification times of `files` stay the same.

    Args:
      cache_file: the .npz of the cache, written if possible; None for no cache.
      files: the files from which the arrays are computed.
      compute: returns the arrays by name; called if the cache is missing, unreadable or of other files.
    """
    state = np.frombuffer(
        hashlib.blake2b("\n".join(map(_file_state, files)).encode("utf-8", "replace")).digest(), np.uint8
    )
    if cache_file is not None and cache_file.is_file():
        try:
            with np.load(cache_file, allow_pickle=False) as stored:
                if np.array_equal(stored[_STATE], state):
                    return {name: stored[name] for name in stored.files if name != _STATE}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s cannot be read (%s) and is made again.", cache_file, error)
    arrays = compute()
    if cache_file is not None:
        _save(cache_file, {**arrays, _STATE: state})
    return arrays


def _file_state(file: str | Path) -> str:
    """Returns the name, size in bytes and modification time in ns of a file."""
    try:
        status = Path(file).stat()
    except (OSError, ValueError):
        return f"{file} is not there"
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def _save(cache_file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an .npz; logs a warning if that fails, as they can be computed again."""
    try:
        with atomic(cache_file) as draft:
            np.savez(draft, **arrays)  # pyright: ignore[reportArgumentType]  (no array is named allow_pickle)
    except OSError as error:
        logging.warning("%s is not kept (%s); it is computed again at the next start.", cache_file, error)


def cache_file_of(cache: str | Path | None, *source: object) -> Path | None:
    """Returns the cache file of the digests of a source, or None if `cache` is None.

    Args:
      cache: the cache folder.
      *source: values whose `repr` identifies the source.
    """
    if cache is None:
        return None
    name = hashlib.blake2b(repr(source).encode("utf-8", "replace"), digest_size=8).hexdigest()
    return Path(cache).expanduser() / "digests" / f"{name}.npz"
