"""Parses the text of a compiled program, to count the bytes of collectives and of copied operands.

The text is XLA's (`compiled.as_text()`) after partitioning, so shapes are those of one device. It contains the body of
a loop once; the loop's `known_trip_count` is its number of iterations, or, in programs for TPUs, which lack it, the
constant that its condition compares the counter with. A loop that may end early, such as generation, counts with the
most iterations, and one without a limit counts once.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_NUMBER = re.compile(r"(\d+)\)")
_CHANNEL = re.compile(r"\bchannel_id=\d+")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\(\d+\)")  # memory space of a layout
_HALF = ("bf16", "f16")
_COMPUTES = ("fusion", "dot", "convolution", "custom-call", "while")


class Instruction(NamedTuple):
    """An instruction, from a line `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str


class Module(NamedTuple):
    """Instructions by computation, and the name of the entry computation."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a program into computations and instructions."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(match[1], match[2], match[3], match[4]))
        elif current and computations[current] and line != "}":  # the metadata of a kernel may have several lines
            last = computations[current][-1]
            computations[current][-1] = last._replace(rest=f"{last.rest}\n{line}")
    return Module(computations, entry)


def operands(instruction: Instruction) -> list[str]:
    """Returns the names of the operands of an instruction."""
    return _OPERANDS.findall(instruction.rest.partition(")")[0])


def arrays(text: str) -> list[str]:
    """Returns the types of all arrays in a type, with their layouts."""
    return _ARRAY.findall(text)


def is_in_hbm(array: str) -> bool:
    """Whether an array of this type, with its layout, is in HBM and not in memory on the chip of a TPU."""
    return _ON_CHIP.search(array) is None


def type_bytes(text: str) -> int:
    """Returns the bytes of a type such as `f32[8,64]{1,0}`, or of all elements of a tuple, without padding."""
    bits = 0
    for kind, width, dims in _SHAPE.findall(text):
        bits += (8 if kind == "pred" else int(width or 0)) * math.prod(map(int, filter(None, dims.split(","))))
    return -(-bits // 8)


def dimensions(text: str) -> tuple[int, ...]:
    """Returns the shape of an array type."""
    return shapes(text)[0]


def shapes(text: str) -> list[tuple[int, ...]]:
    """Returns the shapes of all arrays in a type, which may be a tuple."""
    return [tuple(int(size) for size in dims.split(",") if size) for _, _, dims in _SHAPE.findall(text)]


def collectives(module: Module) -> Counter[tuple[str, str]]:
    """Counts collectives in one execution, with loop iterations: {(kind in COLLECTIVES, type of result): count}."""
    total: Counter[tuple[str, str]] = Counter()
    for one, times in _collectives(module).items():
        total[one.kind, one.type] += times
    return total


def collective_bytes(module: Module, overlapped: bool | None = None) -> dict[str, int]:
    """Returns the bytes of results of each kind of collective on one device in one execution; only kinds that occur.

    Args:
      module: the program.
      overlapped: count only those that run while something is computed, or only the others; None counts all.
    """
    total: Counter[str] = Counter()
    for one, times in _collectives(module).items():
        if overlapped in (None, one.overlapped):
            total[one.kind] += times * type_bytes(one.type)
    return {kind: total[kind] for kind in COLLECTIVES if total[kind]}


class _Collective(NamedTuple):
    """A collective; `overlapped` if computations are scheduled between its start and its end."""

    kind: str
    type: str
    overlapped: bool


def _collectives(module: Module) -> Counter[_Collective]:
    """Counts collectives in one execution, with loop iterations."""

    @functools.cache
    def count(name: str) -> Counter[_Collective]:
        body = module.computations.get(name, ())
        total = Counter(_asynchronous(body, module))
        for instruction in body:
            if instruction.opcode in COLLECTIVES:
                total[_Collective(instruction.opcode, instruction.type, False)] += 1
            elif instruction.opcode != "fusion" and not instruction.opcode.endswith(("-done", "-update")):
                for called, times in calls(instruction, module):
                    for key, inner in count(called).items():
                        total[key] += times * inner
        return total

    return count(module.entry)


def _asynchronous(body: Sequence[Instruction], module: Module) -> list[_Collective]:
    """Returns the collectives of a computation that have a start and an end in its schedule.

    On TPUs a collective is a part of several fusions: one that starts it, those that advance it beside their own
    computation, and one that ends it. All name its channel.
    """
    starts = {one.name: index for index, one in enumerate(body) if one.opcode.endswith("-start")}
    spans: list[tuple[str, str, int, int]] = []  # kind, type, first and last index
    fused: dict[tuple[str, str], tuple[str, str, int, int]] = {}
    for index, one in enumerate(body):
        kind = one.opcode.removesuffix("-done")
        if kind in COLLECTIVES and kind != one.opcode:
            operand = re.match(r"\(*%?([\w.\-]+)", one.rest)
            spans.append((kind, one.type, starts.get(operand[1] if operand else "", index), index))
        elif one.opcode == "fusion":
            for inner in _inside(one, module):
                key = inner.opcode, (_CHANNEL.search(inner.rest) or [inner.name])[0]
                first = fused[key][2] if key in fused else index
                fused[key] = inner.opcode, inner.type, first, index
    computing = [index for index, one in enumerate(body) if one.opcode in _COMPUTES]
    return [
        _Collective(kind, type_, any(first < index < last for index in computing))
        for kind, type_, first, last in (*spans, *fused.values())
    ]


def _inside(fusion: Instruction, module: Module) -> Iterator[Instruction]:
    """Yields the collectives inside a fusion."""
    for name, _ in calls(fusion, module):
        for instruction in module.computations.get(name, ()):
            if instruction.opcode in COLLECTIVES:
                yield instruction
            elif instruction.opcode == "fusion":
                yield from _inside(instruction, module)


def calls(instruction: Instruction, module: Module) -> list[tuple[str, int]]:
    """Returns the computations that an instruction calls, and how often."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    times = _trip_count(instruction, module) if instruction.opcode == "while" else 1
    return [(name, times) for name in names]


def _trip_count(loop: Instruction, module: Module) -> int:
    """Returns the most iterations of a `while`; 1 if they are unknown."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = _CONDITION.search(loop.rest)
    instructions = list(module.computations.get(condition[1], ())) if condition else []
    if instructions and instructions[-1].opcode == "fusion":  # the comparison may be fused
        instructions += [inner for name, _ in calls(instructions[-1], module) for inner in module.computations[name]]
    if not instructions or instructions[-1].opcode not in ("compare", "and"):
        return 1
    compares = [one for one in instructions if one.opcode == "compare" and "direction=LT" in one.rest]
    limits = {int(match[1]) for one in instructions if one.opcode == "constant" and (match := _NUMBER.match(one.rest))}
    return limits.pop() if len(compares) == len(limits) == 1 else 1


def float32_copies(module: Module) -> int:
    """Returns the bytes of float32 copies of the program's bfloat16 or float16 arguments, which are weights.

    The CPU backend computes products in float32 and makes these copies outside the loop over layers; a GPU or TPU does
    not. An argument counts at most once, and a copy may permute its dimensions.
    """
    arguments: Counter[tuple[int, ...]] = Counter()
    for instruction in module.computations[module.entry]:
        if instruction.opcode == "parameter" and (dims := _dims(instruction.type, _HALF)):
            arguments[dims] += 1
    copies: dict[tuple[int, ...], int] = defaultdict(int)
    for name in _executed(module):
        for instruction in module.computations[name]:
            dims = _dims(instruction.type, ("f32",))
            if dims is None or dims not in arguments:
                continue
            if instruction.opcode in ("convert", "fusion") and "convert" in instruction.name:
                copies[dims] += 1
    return sum(min(count, arguments[dims]) * 4 * math.prod(dims) for dims, count in copies.items())


def _dims(text: str, dtypes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Returns the sorted dimensions, without 1s, of an array of one of the dtypes; None for other types and scalars."""
    match = _SHAPE.match(text)
    if match is None or match[1] + match[2] not in dtypes:
        return None
    return tuple(sorted(int(size) for size in match[3].split(",") if size not in ("", "1"))) or None


def _executed(module: Module) -> set[str]:
    """Returns the computations whose instructions have their own buffers: entry, loop bodies and calls, not fusions."""
    reached, todo = set(), [module.entry]
    while todo:
        name = todo.pop()
        if name in reached or name not in module.computations:
            continue
        reached.add(name)
        for instruction in module.computations[name]:
            if instruction.opcode in ("while", "call", "conditional"):
                todo += [called for called, _ in calls(instruction, module)]
    return reached
