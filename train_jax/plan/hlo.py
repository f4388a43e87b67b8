"""What the text of a compiled program tells that its statistics do not: bytes of collectives, copies of operands.

The text is XLA's (`compiled.as_text()`), after partitioning: shapes are those of one device. A loop's body stands there
once; how often it runs is in the loop's `known_trip_count`, and a loop of unknown length counts once.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_HALF = ("bf16", "f16")


class Instruction(NamedTuple):
    """One line: `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str


class Module(NamedTuple):
    """Instructions by computation, and the name of the one that runs."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Splits the text into computations and instructions."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(*found.groups()))
    return Module(computations, entry)


def type_bytes(text: str) -> int:
    """Bytes of a type such as `f32[8,64]{1,0}` or of all members of a tuple; layouts and padding do not count."""
    bits = 0
    for kind, width, dims in _SHAPE.findall(text):
        bits += (8 if kind == "pred" else int(width or 0)) * math.prod(map(int, filter(None, dims.split(","))))
    return -(-bits // 8)


def dimensions(text: str) -> tuple[int, ...]:
    """Sizes of the axes of an array's type."""
    return shapes(text)[0]


def shapes(text: str) -> list[tuple[int, ...]]:
    """Sizes of the axes of every array of a type, which may be a tuple."""
    return [tuple(int(size) for size in found[2].split(",") if size) for found in _SHAPE.findall(text)]


def collectives(module: Module) -> Counter:
    """How often one execution exchanges what: {(kind of COLLECTIVES, type of the result): times}, loops counted."""

    @functools.cache
    def of(name: str) -> Counter:
        total = Counter()
        for instruction in module.computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-done")  # the result of one that was started before
            if kind in COLLECTIVES:
                total[kind, instruction.type] += 1
            elif not instruction.opcode.endswith(("-done", "-update")):
                for called, times in calls(instruction):
                    for found, count in of(called).items():
                        total[found] += times * count
        return total

    return of(module.entry)


def collective_bytes(module: Module) -> dict[str, int]:
    """Bytes that each kind of collective leaves on one device in one execution, loops counted; kinds that occur."""
    total = Counter()
    for (kind, type_), times in collectives(module).items():
        total[kind] += times * type_bytes(type_)
    return {kind: total[kind] for kind in COLLECTIVES if total[kind]}


def calls(instruction: Instruction) -> list[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    trips = _TRIPS.search(instruction.rest) if instruction.opcode == "while" else None
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return [(name, int(trips[1]) if trips else 1) for name in names]


def float32_copies(module: Module) -> int:
    """Bytes of whole float32 copies of the program's bfloat16 or float16 arguments (weights, that is).

    The CPU backend multiplies in float32 and makes such a copy for a product, outside of the loop over layers; a GPU or
    a TPU does not. An argument counts at most once, whatever the order of its dimensions in the copy.
    """
    arguments: Counter = Counter()
    for instruction in module.computations[module.entry]:
        if instruction.opcode == "parameter" and (dims := _dims(instruction.type, _HALF)):
            arguments[dims] += 1
    copies: dict[tuple[int, ...], int] = defaultdict(int)
    for name in _executed(module):
        for instruction in module.computations[name]:
            dims = _dims(instruction.type, ("f32",))
            if instruction.opcode in ("convert", "fusion") and "convert" in instruction.name and dims in arguments:
                copies[dims] += 1
    return sum(min(count, arguments[dims]) * 4 * math.prod(dims) for dims, count in copies.items())


def _dims(text: str, kinds: tuple[str, ...]) -> tuple[int, ...] | None:
    """The sorted dimensions, 1s left out, of an array of one of these kinds; None for another type and for a scalar."""
    found = _SHAPE.match(text)
    if found is None or found[1] + found[2] not in kinds:
        return None
    return tuple(sorted(int(size) for size in found[3].split(",") if size not in ("", "1"))) or None


def _executed(module: Module) -> set[str]:
    """Computations whose instructions have buffers of their own: the entry, loop bodies, calls; not what is fused."""
    reached, todo = set(), [module.entry]
    while todo:
        name = todo.pop()
        if name in reached or name not in module.computations:
            continue
        reached.add(name)
        for instruction in module.computations[name]:
            if instruction.opcode in ("while", "call", "conditional"):
                todo += [called for called, _ in calls(instruction)]
    return reached
