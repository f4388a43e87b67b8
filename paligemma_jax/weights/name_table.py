"""Declarative name tables: one row a leaf, read in both directions, every key accounted for on both sides.

A row says where a leaf of ours lives in the other format and how the array is laid out there. Templates contain `{i}`
where the other format stores one array a layer; ours always stacks layers on the leading axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """Our path, their name (template), and the layout on their side.

    Layouts, for a leaf of ours of one layer, kernels being shaped [in..., out...]:
      "same"      equal
      "flat"      a vector (torch's biases) for our [N, H]
      "linear"    torch's Linear weight (out, in), the kernel's `contracted` leading axes being the input
      "conv"      torch's Conv2d weight (out, in, kh, kw) for our [kh, kw, in, out]
      "heads_in"  big_vision's [N, D, H] for our [D, N, H]
      "row"       an axis of size 1 in front
      "token"     two axes of size 1 in front
    `part` picks one of `parts` leaves of ours that share an array there: by the index of a leading axis (big_vision's
    kv and gating einsums), or where `packed`, one behind another on the first axis (torch's in_proj).
    `dtype` is kept whatever dtype the model is read in, as codes need it; None where it is cast.
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
        """Shape on their side of a leaf that is `shape` here, with those that share the array."""
        stored = self._own_shape(shape)
        if self.part is None:
            return stored
        return (self.parts * stored[0], *stored[1:]) if self.packed else (self.parts, *stored)

    def _own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the leaf alone."""
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
        """Their array of one layer as ours of `shape`; `where` (file and name) is for the message.

        Raises:
          UserError: it has another shape; axes of size 1 do not count.
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
        """Our array of one layer in their layout (without joining parts)."""
        if self.layout == "linear":
            return array.reshape(self._own_shape(array.shape)[::-1]).T
        if self.layout == "conv":
            return array.transpose(3, 2, 0, 1)
        if self.layout == "heads_in":
            return array.transpose(1, 0, 2)
        return array.reshape(self._own_shape(array.shape))


@runtime_checkable
class Source(Protocol):
    """A checkpoint's arrays by their names there; nothing is read before it is asked for."""

    path: Path

    def names(self) -> set[str]:
        """Every array the checkpoint has."""

    def dtype(self, name: str) -> np.dtype:
        """Dtype of an array, without reading it."""

    def __getitem__(self, name: str) -> np.ndarray:
        """One whole array."""

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """The slices of an array's first axis, one after another, so that they need not be in memory together."""


# One layer of a leaf of ours to what takes its place, by path; None where the leaf stays as it is.
Transform = Callable[[str, np.ndarray], Mapping[str, np.ndarray] | None]


def stacked(path: str) -> bool:
    """Whether one of our paths has a leading layer axis."""
    return "layers" in path.split("/")


def check_names(
    rows: Iterable[Row], names: Iterable[str], shapes: Mapping[str, jax.ShapeDtypeStruct], source: str
) -> None:
    """Accounts for every key of both sides, before anything is read.

    Args:
      rows: the table of this family.
      names: every key the source has.
      shapes: our abstract parameters by path.
      source: file or folder, for the message.

    Raises:
      UserError: a leaf of ours that the source lacks, or a key of the source that the table does not use (lists them).
    """
    table, names = {row.ours: row for row in rows}, set(names)
    unknown = sorted(set(shapes) - set(table))
    if unknown:
        raise ValueError(f"the name table has no row for {unknown}.")
    wanted = {name for path, leaf in shapes.items() for name in _names_of(table[path], leaf.shape)}
    missing, unused = sorted(wanted - names), sorted(names - wanted)
    if missing or unused:
        raise UserError(
            f"{source} does not match the model: missing {listed(missing)}; not used {listed(unused)}. "
            "Check that the file belongs to this architecture."
        )


def read_rows(
    rows: Iterable[Row],
    source: Source,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dtype,
    transform: Transform | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads every leaf of `shapes` by the table, layer by layer into stacked arrays, one leaf at a time.

    At no time is more held than the leaf that is being built and one layer of it, so a caller who places each leaf
    as it comes needs little more than the model. Leaves without layers, the large word table among them, come first,
    when the least is held already.

    Args:
      rows: the table of this family; its names are those of `source` (see `check_names`).
      source: the checkpoint.
      shapes: our abstract parameters by path, as the checkpoint holds them.
      dtype: dtype to cast to, where a row does not keep its own.
      transform: makes one or several leaves of each layer of one (quantisation, say); theirs are stacked likewise.

    Yields:
      Path and array.

    Raises:
      UserError: an array of another shape.
    """
    table = {row.ours: row for row in rows}
    for path in sorted(shapes, key=stacked):
        layers, kept = _read_leaf(table[path], source, shapes[path].shape), table[path].dtype or dtype
        depth = shapes[path].shape[0] if stacked(path) else None
        out: dict[str, np.ndarray] = {}
        for i, layer in enumerate(layers):
            parts = transform(path, np.asarray(layer, kept)) if transform else None
            for name, part in ({path: layer} if parts is None else parts).items():
                if i == 0:
                    shape = part.shape if depth is None else (depth, *part.shape)
                    out[name] = _aligned_empty(shape, kept if parts is None else part.dtype)
                out[name][... if depth is None else i] = part
        yield from out.items()


def _names_of(row: Row, shape: tuple[int, ...]) -> list[str]:
    """The names of a leaf's arrays on their side."""
    return [row.theirs.format(i=i) for i in range(shape[0])] if "{i}" in row.theirs else [row.theirs]


def _read_leaf(row: Row, source: Source, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A leaf's layers one by one, or the one array of a leaf without layers."""
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
    """An array that starts on a cache line: such a one JAX adopts on CPU, where it would copy another."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def write_rows(
    rows: Iterable[Row], params: Mapping[str, jax.Array | np.ndarray], target: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf under its name on the other side, a leaf at a time; one array a layer where the template says so.

    Args:
      rows: the table of this family.
      params: our arrays by path.
      target: what is being written, for the message.

    Yields:
      Name and array there; leaves that share one array there are joined.

    Raises:
      UserError: arrays that the table does not know: adapters, or a quantised kernel.
    """
    sharing: dict[str, list[Row]] = {}
    for row in rows:
        sharing.setdefault(row.theirs, []).append(row)
    known = {row.ours for group in sharing.values() for row in group}
    if set(params) != known:
        raise UserError(
            f"{target} holds the plain parameters of a whole model, but found {listed(sorted(set(params) - known))} "
            f"beside them and {listed(sorted(known - set(params)))} missing: merge adapters and dequantize kernels."
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
    """One layer on their side, of the leaves of ours that it holds."""
    parts = [group[0].write(array) for array in arrays]
    if group[0].part is None:
        return parts[0]
    return np.concatenate(parts) if group[0].packed else np.stack(parts)


def listed(names: list[str], most: int = 8) -> str:
    """A few names and how many more."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count_layers(names: Iterable[str], template: str) -> int:
    """How many layers a file holds, from the highest `{i}` of a template (a regular expression but for `{i}`)."""
    pattern = re.compile(template.replace("{i}", r"(\d+)"))
    found = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(found, default=-1) + 1
