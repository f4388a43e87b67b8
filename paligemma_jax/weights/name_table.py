"""Name tables between our parameter paths and another format's array names, for reading and writing.

A row gives the name of a leaf in the other format and the array's layout there. Every key must be accounted for on both
sides. Templates contain `{i}` where the other format stores one array per layer; ours always stacks layers on the
leading axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from train_jax.core.errors import UserError, listed


@dataclasses.dataclass(frozen=True)
class Row:
    """Our path, their name (a template), and the layout of their array.

    Layouts, for one layer of a leaf; our kernels have shape [in..., out...]:
      "same"      equal
      "flat"      a vector (torch's biases) for our [N, H]
      "linear"    torch's Linear weight (out, in); the kernel's first `contracted` axes are the input
      "conv"      torch's Conv2d weight (out, in, kh, kw) for our [kh, kw, in, out]
      "heads_in"  big_vision's [N, D, H] for our [D, N, H]
      "row"       an additional leading axis of size 1
      "token"     two additional leading axes of size 1
    `part` selects one of `parts` leaves of ours that share an array there: by the index of a leading axis (big_vision's
    kv and gating einsums), or, if `packed`, by its section of the first axis (torch's in_proj).
    `dtype` is kept whatever dtype the model is read in, as for quantised codes; None means that it is cast.
    """

    ours: str
    theirs: str
    layout: str = "same"
    contracted: int = 1
    part: int | None = None
    parts: int = 2
    packed: bool = False
    dtype: str | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of their array for a leaf of `shape`, with the leaves that share the array."""
        stored = self._own_shape(shape)
        if self.part is None:
            return stored
        return (self.parts * stored[0], *stored[1:]) if self.packed else (self.parts, *stored)

    def _own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape on their side of the leaf alone."""
        if self.layout == "linear":
            inputs, outputs = shape[: self.contracted], shape[self.contracted :]
            return math.prod(outputs), math.prod(inputs)
        if self.layout == "flat":
            return (math.prod(shape),)
        if self.layout in ("row", "token"):
            return (1,) * ("row", "token").index(self.layout) + (1, *shape)
        axes = {"conv": (3, 2, 0, 1), "heads_in": (1, 0, 2)}.get(self.layout)
        return tuple(shape[axis] for axis in axes) if axes else tuple(shape)

    def read(self, array: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
        """Converts their array of one layer to ours of `shape`; `where` (file and name) is for the message.

        Raises:
          UserError: it has another shape; axes of size 1 are ignored.
        """
        expected = self.stored_shape(shape)
        if [n for n in array.shape if n != 1] != [n for n in expected if n != 1]:
            raise UserError(
                f"{where} has shape {array.shape}, but {self.ours} needs {expected}: the file belongs to a model of "
                "other sizes."
            )
        array = array.reshape(expected)
        if self.part is not None:
            array = array.reshape(self.parts, *self._own_shape(shape))[self.part]
        if self.layout == "linear":
            array = array.T
        elif self.layout == "conv":
            array = array.transpose(2, 3, 1, 0)
        elif self.layout == "heads_in":
            array = array.transpose(1, 0, 2)
        return array.reshape(shape)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Converts our array of one layer to their layout, without joining parts."""
        if self.layout == "linear":
            return array.reshape(self._own_shape(array.shape)[::-1]).T
        if self.layout == "conv":
            return array.transpose(3, 2, 0, 1)
        if self.layout == "heads_in":
            return array.transpose(1, 0, 2)
        return array.reshape(self._own_shape(array.shape))


@runtime_checkable
class ArraySource(Protocol):
    """A checkpoint's arrays by their names there; each is read when it is asked for."""

    path: Path

    def names(self) -> set[str]:
        """Returns the names of all arrays of the checkpoint."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, without reading it."""
        ...

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns one whole array."""
        ...

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """Yields the slices of an array's first axis, so that they need not be in memory together."""
        ...


# Maps one layer of a leaf of ours to the arrays that replace it, by path; None leaves it unchanged.
Transform = Callable[[str, np.ndarray], Mapping[str, np.ndarray] | None]


def stacked(path: str) -> bool:
    """Returns whether one of our paths has a leading layer axis."""
    return "layers" in path.split("/")


def check_names(
    rows: Iterable[Row], names: Iterable[str], shapes: Mapping[str, jax.ShapeDtypeStruct], source: str
) -> None:
    """Checks, before any array is read, that every key is accounted for on both sides.

    Args:
      rows: the table of this family.
      names: every key of the source.
      shapes: our abstract parameters by path.
      source: file or folder, for the message.

    Raises:
      UserError: a leaf of ours that the source lacks, or a key of the source that the table does not use (lists them).
    """
    table, names = {row.ours: row for row in rows}, set(names)
    unknown = sorted(set(shapes) - set(table))
    if unknown:
        raise ValueError(f"the name table has no row for {unknown}.")
    expected = {name for path, leaf in shapes.items() for name in _names_of(table[path], leaf.shape)}
    missing, unused = sorted(expected - names), sorted(names - expected)
    if missing or unused:
        raise UserError(
            f"{source} does not match the model: missing {listed(missing)}; not used {listed(unused)}. "
            "Check that the file belongs to this architecture."
        )


def read_rows(
    rows: Iterable[Row],
    source: ArraySource,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dtype,
    transform: Transform | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads every leaf of `shapes` by the table, layer by layer into stacked arrays, one leaf at a time.

    At any time, only the leaf being built and one layer of it are in memory, so a caller that places each leaf as it
    comes needs little more than the model. Leaves without layers, such as the large token embedding, come first, when
    the fewest leaves are in memory.

    Args:
      rows: the table of this family; its names are those of `source` (see `check_names`).
      source: the checkpoint.
      shapes: our abstract parameters by path, as stored in the checkpoint.
      dtype: dtype to cast to, unless a row has its own.
      transform: turns each layer of a leaf into one or several leaves (for example by quantisation), which are stacked
        too.

    Yields:
      Path and array.

    Raises:
      UserError: an array of another shape.
    """
    table = {row.ours: row for row in rows}
    for path in sorted(shapes, key=stacked):
        layers, target = _read_leaf(table[path], source, shapes[path].shape), table[path].dtype or dtype
        depth = shapes[path].shape[0] if stacked(path) else None
        out: dict[str, np.ndarray] = {}
        for i, layer in enumerate(layers):
            parts = transform(path, np.asarray(layer, target)) if transform else None
            for name, part in ({path: layer} if parts is None else parts).items():
                if i == 0:
                    shape = part.shape if depth is None else (depth, *part.shape)
                    out[name] = _aligned_empty(shape, target if parts is None else part.dtype)
                out[name][... if depth is None else i] = part
        yield from out.items()


def _names_of(row: Row, shape: tuple[int, ...]) -> list[str]:
    """Returns the names of a leaf's arrays on their side."""
    return [row.theirs.format(i=i) for i in range(shape[0])] if "{i}" in row.theirs else [row.theirs]


def _read_leaf(row: Row, source: ArraySource, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields a leaf's layers one by one, or the one array of a leaf without layers."""
    names, where = _names_of(row, shape), f"{source.path}: "
    if "{i}" in row.theirs:
        for name in names:
            yield row.read(source[name], shape[1:], where + name)
    elif not stacked(row.ours):
        yield row.read(source[names[0]], shape, where + names[0])
    else:
        count = 0
        for count, layer in enumerate(source.layers(names[0]), 1):
            if count > shape[0]:
                break
            yield row.read(layer, shape[1:], f"{where}layer {count - 1} of {names[0]}")
        if count != shape[0]:
            raise UserError(
                f"{where}{names[0]} does not have {shape[0]} layers on its first axis, as other arrays do: the file "
                "belongs to a model of other sizes."
            )


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Returns an array aligned to a cache line, which JAX adopts on CPU; it copies unaligned arrays."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def write_rows(
    rows: Iterable[Row], params: Mapping[str, jax.Array | np.ndarray], target: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every leaf under its name on the other side, one at a time; one array per layer if the template says so.

    Args:
      rows: the table of this family.
      params: our arrays by path.
      target: the file or folder to be written, for the message.

    Yields:
      Name and array there; leaves that share one array there are joined.

    Raises:
      UserError: arrays that the table does not have: adapters, or a quantised kernel.
    """
    sharing: dict[str, list[Row]] = {}
    for row in rows:
        sharing.setdefault(row.theirs, []).append(row)
    paths = {row.ours for group in sharing.values() for row in group}
    if set(params) != paths:
        raise UserError(
            f"{target} holds the plain parameters of a whole model, but found {listed(sorted(set(params) - paths))} "
            f"beside them and {listed(sorted(paths - set(params)))} missing: merge adapters and dequantize kernels."
        )
    for name, group in sharing.items():
        arrays = [np.asarray(params[row.ours]) for row in sorted(group, key=lambda row: row.part or 0)]
        if "{i}" in name:
            for i in range(len(arrays[0])):
                yield name.format(i=i), _join(group, [array[i] for array in arrays])
        elif stacked(group[0].ours):
            yield name, np.stack([_join(group, list(layers)) for layers in zip(*arrays, strict=True)])
        else:
            yield name, _join(group, arrays)


def _join(group: list[Row], arrays: list[np.ndarray]) -> np.ndarray:
    """Returns one layer of their array, joined from the leaves of ours that it holds."""
    parts = [group[0].write(array) for array in arrays]
    if group[0].part is None:
        return parts[0]
    return np.concatenate(parts) if group[0].packed else np.stack(parts)


def count_layers(names: Iterable[str], template: str) -> int:
    """Returns the number of layers in a file: one plus the highest `{i}` of a template (else a regular expression)."""
    pattern = re.compile(template.replace("{i}", r"(\d+)"))
    indices = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(indices, default=-1) + 1
