"""Reads and writes npz archives one array, or one layer, at a time; bfloat16 as numpy stores it (void16)."""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np

from train_jax.core.errors import UserError
from train_jax.core.files import atomic

PREFIX = "params/"
VOID16 = np.dtype("V2")
BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class Npz:
    """Reads an archive's arrays on demand, with or without the `params/` prefix; never unpickles.

    Of a whole train state (parameters and optimizer) only the arrays under `params/` are used.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except BROKEN as error:
            raise UserError(f"{path} cannot be read as npz ({error}): download it again.") from None
        members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}
        prefixed = {name.removeprefix(PREFIX): info for name, info in members.items() if name.startswith(PREFIX)}
        self._members = prefixed or members

    def names(self) -> set[str]:
        """Returns the names of all arrays."""
        return set(self._members)

    def shape(self, name: str, *ranks: int) -> tuple[int, ...]:
        """Returns the shape of an array, which must have one of these numbers of axes, without reading it."""
        with self._stream(name) as stream:
            shape = self._header(name, stream)[0]
        if len(shape) not in ranks:
            raise UserError(
                f"{self.path}: {name} has shape {shape}, expected {' or '.join(map(str, ranks))} axes: it belongs to "
                "another model."
            )
        return shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, without reading it."""
        with self._stream(name) as stream:
            return self._header(name, stream)[2]

    def __getitem__(self, name: str) -> np.ndarray:
        with self._stream(name) as stream:
            shape, fortran, dtype = self._header(name, stream)
            array = self._read(name, stream, math.prod(shape), dtype, last=True)
            return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """Yields the slices of an array's first axis."""
        with self._stream(name) as stream:
            shape, fortran, dtype = self._header(name, stream)
            if fortran and len(shape) > 1:  # layers are not contiguous
                array = self._read(name, stream, math.prod(shape), dtype, last=True)
                yield from array.reshape(shape[::-1]).T
                return
            depth = shape[0] if shape else 0
            for i in range(depth):
                layer = self._read(name, stream, math.prod(shape[1:]), dtype, last=i == depth - 1)
                yield layer.reshape(shape[1:])

    def _stream(self, name: str) -> zipfile.ZipExtFile:
        if name not in self._members:
            raise UserError(f"{self.path} has no array {name}: it is not a PaliGemma or SigLIP of big_vision.")
        try:
            return cast(zipfile.ZipExtFile, self._zip.open(self._members[name]))  # when opened for reading
        except BROKEN as error:
            raise self._broken(name, error) from None

    def _header(self, name: str, stream: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Returns shape, whether in Fortran order, and dtype (bfloat16 for void16); checks the member's size."""
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            if dtype.hasobject:
                raise ValueError("it holds Python objects, which are never unpickled")
            if self._members[name].file_size - stream.tell() != math.prod(shape) * dtype.itemsize:
                raise ValueError("its data are cut off")
        except BROKEN as error:
            raise self._broken(name, error) from None
        return shape, fortran, np.dtype(ml_dtypes.bfloat16) if dtype == VOID16 else dtype

    def _read(self, name: str, stream: zipfile.ZipExtFile, count: int, dtype: np.dtype, last: bool) -> np.ndarray:
        """Reads the next `count` numbers, flat."""
        array = np.empty(count, dtype)
        view = array.view(np.uint8).data
        try:
            done = 0
            while done < len(view):
                step = stream.readinto(view[done:])
                if not step:
                    raise EOFError("its data are cut off")
                done += step
            if last:
                stream.read(1)  # the checksum is compared at the end of a member
        except BROKEN as error:
            raise self._broken(name, error) from None
        return array

    def _broken(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.path}: the array {name} cannot be read ({error}): download it again.")


def write_npz(file: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes arrays one by one, under `params/` as in released files; the file is complete or not written."""
    with atomic(file) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays:
            array = np.asarray(array, order="C")
            if array.dtype == ml_dtypes.bfloat16:
                array = array.view(VOID16)
            with archive.open(f"{PREFIX}{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
