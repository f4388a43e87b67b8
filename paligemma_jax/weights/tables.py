"""Declarative name tables: one row a leaf, read in both directions, every key accounted for on both sides.

A row says where a leaf of ours lives in the other format and how the array is laid out there. Templates contain `{i}`
where the other format stores one array a layer; ours always stacks layers on the leading axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from train_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """Our path, their name (template), and the layout on their side.

    Layouts, for a leaf of ours of one layer, kernels being shaped [in..., out...]:
      "same"      equal
      "flat"      a vector (torch's biases) for our [N, H]
      "linear"    torch's Linear weight (out, in), the kernel's `contracted` leading axes being the input
      "conv"      torch's Conv2d weight (out, in, kh, kw) for our [kh, kw, in, out]
      "heads_in"  big_vision's [N, D, H] for our [D, N, H]
    `part` picks an index of a leading axis that holds two leaves of ours (big_vision's kv and gating einsums).
    """

    ours: str
    theirs: str
    layout: str = "same"
    contracted: int = 1
    part: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on their side of a leaf that is `shape` here."""
        if self.layout == "linear":
            inputs, outputs = shape[: self.contracted], shape[self.contracted :]
            return math.prod(outputs), math.prod(inputs)
        axes = {"conv": (3, 2, 0, 1), "heads_in": (1, 0, 2)}.get(self.layout)
        stored = tuple(shape[axis] for axis in axes) if axes else tuple(shape)
        stored = (math.prod(stored),) if self.layout == "flat" else stored
        return stored if self.part is None else (2, *stored)

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
            array = array[self.part]
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
            return array.reshape(self.stored_shape(array.shape)[::-1]).T
        if self.layout == "conv":
            return array.transpose(3, 2, 0, 1)
        if self.layout == "heads_in":
            return array.transpose(1, 0, 2)
        return array.reshape(-1) if self.layout == "flat" else array


def stacked(path: str) -> bool:
    """Whether one of our paths has a leading layer axis."""
    return "/layers/" in path


def read_rows(
    rows: Iterable[Row],
    names: Iterable[str],
    fetch: Callable[[str], np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dtype,
    *,
    source: str,
    scanned: bool = False,
) -> dict[str, np.ndarray]:
    """Reads every leaf of `shapes` by the table, layer by layer into the stacked arrays.

    Args:
      rows: the table of this family.
      names: every key the file has.
      fetch: returns one stored array.
      shapes: our abstract parameters by path.
      dtype: dtype to cast to.
      source: file or folder, for messages.
      scanned: the other format stacks layers too (no `{i}` in its names).

    Raises:
      UserError: a leaf of ours that the file lacks, a key of the file that the table does not use (lists them), or an
        array of another shape.
    """
    table = {row.ours: row for row in rows}
    unknown = sorted(set(shapes) - set(table))
    if unknown:
        raise ValueError(f"the name table has no row for {unknown}.")
    names = set(names)
    used, missing, out = set(), [], {}
    for path, leaf in shapes.items():
        row = table[path]
        each = [row.theirs.format(i=i) for i in range(leaf.shape[0])] if "{i}" in row.theirs else [row.theirs]
        absent = [name for name in each if name not in names]
        used.update(each)
        if absent:
            missing.extend(absent)
            continue
        array = np.empty(leaf.shape, dtype)
        if "{i}" in row.theirs:
            for i, name in enumerate(each):
                array[i] = row.read(fetch(name), leaf.shape[1:], f"{source}: {name}")
        elif scanned and stacked(path):
            layers = fetch(each[0])
            if layers.shape[:1] != leaf.shape[:1]:
                raise UserError(
                    f"{source}: {each[0]} has shape {layers.shape}, expected {leaf.shape[0]} layers on its first axis: "
                    "the file belongs to a model of other sizes."
                )
            for i, layer in enumerate(layers):
                array[i] = row.read(layer, leaf.shape[1:], f"{source}: layer {i} of {each[0]}")
        else:
            array[...] = row.read(fetch(each[0]), leaf.shape, f"{source}: {each[0]}")
        out[path] = array
    unused = sorted(names - used)
    if missing or unused:
        raise UserError(
            f"{source} does not match the model: missing {_listed(sorted(missing))}; not used {_listed(unused)}. "
            "Check that the file belongs to this architecture."
        )
    return out


def write_rows(rows: Iterable[Row], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every leaf under its name on the other side, one array a layer where the template says so."""
    table, out = {row.ours: row for row in rows}, {}
    for path, array in params.items():
        row = table[path]
        if "{i}" in row.theirs:
            out.update({row.theirs.format(i=i): row.write(layer) for i, layer in enumerate(array)})
        else:
            out[row.theirs] = row.write(array)
    return out


def _listed(names: list[str], most: int = 8) -> str:
    """A few names and how many more."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count_layers(names: Iterable[str], template: str) -> int:
    """How many layers a file holds, from the highest `{i}` of a template (a regular expression but for `{i}`)."""
    pattern = re.compile(template.replace("{i}", r"(\d+)"))
    found = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(found, default=-1) + 1
