"""Estimates the time of a program compiled for a TPU, by class of operation.

The compiler annotates every fusion with `estimated_cycles` and its source lines. Cycles are summed over the program,
with every iteration of its loops. A class's bound is the larger of its products' FLOPs over the peak
and of the bytes that its fusions read and write in HBM over the bandwidth. Collectives and Pallas kernels have no
estimate: collectives are bound by the bandwidth of the links, and a kernel counts as the largest of its FLOPs at the
peak, its bytes at the bandwidth and its vector operations.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from train_jax.plan import flops, hlo, pallas
from train_jax.plan.hlo import Instruction, Module
from train_jax.plan.tpu import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

OTHER = "other"
VECTOR_LANES = 4096  # vector operations of a core in a cycle: four units of 8 x 128
ROOT = str(Path(__file__).parents[2])  # of our packages


class Frame(NamedTuple):
    """The source location from which an operation was traced."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


class Operation(NamedTuple):
    """An instruction with an estimate, in all its executions.

    Attributes:
      name: JAX's name, such as "jit(step)/.../dot_general".
      frames: source frames from which it was traced, the innermost first.
      cycles: the compiler's estimate.
      flops: of products.
      bytes: read from and written to HBM.
    """

    name: str
    frames: tuple[Frame, ...]
    cycles: int
    flops: int
    bytes: int


def operations(text: str) -> list[Operation]:
    """Returns the operations of a program for a TPU that have an estimate, from `compiled.as_text()`."""
    module, frames = hlo.parse(text), _frames(text)
    types = {name: {one.name: one.type for one in body} for name, body in module.computations.items()}
    flops_of = flops.computation_flops(module)
    times: Counter[tuple[str, int]] = Counter()
    for computation, index, count in _executed(module, module.entry, 1):
        times[computation, index] += count
    result = []
    for (computation, index), count in times.items():
        instruction = module.computations[computation][index]
        cycles = _CYCLES.search(instruction.rest)
        if cycles is None:
            continue
        name, frame = _OP_NAME.search(instruction.rest), _FRAME.search(instruction.rest)
        fused = sum(flops_of(called) for called, _ in hlo.calls(instruction, module))
        result.append(
            Operation(
                name[1] if name else instruction.name,
                frames.get(int(frame[1]), ()) if frame else (),
                count * int(cycles[1]),
                count * (fused + flops.instruction_flops(instruction, types[computation])),
                count * _hbm_bytes(instruction, module, types[computation]),
            )
        )
    return result


def classify(operation: Operation, classes: Sequence[tuple[str, str]]) -> str:
    """Returns the class of an operation: the first whose pattern is found in one of its frames, "file:function".

    Args:
      operation: its frames are tried from the innermost on for each pattern.
      classes: (class, pattern) pairs; "other" if none matches.
    """
    locations = [f"{frame.file}:{frame.function}" for frame in operation.frames]
    for name, pattern in classes:
        if any(re.search(pattern, location) for location in locations):
            return name
    return OTHER


class ClassCost(NamedTuple):
    """Totals of a class of operations; fields as of `Operation`."""

    cycles: int
    flops: int
    bytes: int


def by_class(ops: Sequence[Operation], classes: Sequence[tuple[str, str]]) -> dict[str, ClassCost]:
    """Returns the cost of each class that occurs, the most expensive first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for operation in ops:
        total = sums[classify(operation, classes)]
        for index, value in enumerate((operation.cycles, operation.flops, operation.bytes)):
            total[index] += value
    costs = {name: ClassCost(*total) for name, total in sums.items()}
    return dict(sorted(costs.items(), key=lambda item: -item[1].cycles))


class ProgramCost(NamedTuple):
    """The estimated time of a program on one chip, and what bounds it.

    Attributes:
      chip: the chip that it was compiled for.
      classes: by class of operation, the most expensive first.
      sources: (source line, kind of operation, cycles), the most expensive first.
      received: bytes of the results of collectives.
      pallas: Pallas kernels; `cycles` are our count, see the module.
      unestimated: {name: number} of Pallas kernels that could not be read.
    """

    chip: Chip
    classes: dict[str, ClassCost]
    sources: list[tuple[str, str, int]]
    received: int
    pallas: ClassCost
    unestimated: dict[str, int]

    @property
    def seconds(self) -> float:
        """Estimated time of computation, without collectives."""
        return self.compiler_seconds + self.pallas.cycles / self.chip.clock

    @property
    def compiler_seconds(self) -> float:
        """The compiler's own estimate, without Pallas kernels."""
        return sum(cost.cycles for cost in self.classes.values()) / self.chip.clock

    @property
    def collective_seconds(self) -> float:
        """Least time of the collectives: their bytes over the bandwidth of the links."""
        return self.received / self.chip.link_bandwidth

    @property
    def utilisation(self) -> float:
        """FLOPs of products over the chip's peak, in the estimated time; recomputation counts as work."""
        flops_ = self.pallas.flops + sum(cost.flops for cost in self.classes.values())
        return flops_ / self.chip.flops / self.seconds if self.seconds else 0.0

    def bound(self, cost: ClassCost) -> float:
        """Returns the least seconds of a class: its FLOPs over the peak or its bytes over the bandwidth of HBM."""
        return max(cost.flops / self.chip.flops, cost.bytes / self.chip.bandwidth)


def program_cost(text: str, chip: Chip, classes: Sequence[tuple[str, str]]) -> ProgramCost:
    """Returns the cost of a program that was compiled for a TPU, from `compiled.as_text()`."""
    module, ops = hlo.parse(text), operations(text)
    kernels, unread = _pallas(module, chip)
    received = sum(hlo.collective_bytes(module).values())
    return ProgramCost(chip, by_class(ops, classes), by_source(ops, ROOT), received, kernels, unread)


def _pallas(module: Module, chip: Chip) -> tuple[ClassCost, dict[str, int]]:
    """Returns the cost of all Pallas kernels, and the number of calls of those that could not be read."""
    cycles, total, unread = 0.0, pallas.NOTHING, Counter[str]()
    types = {name: {one.name: one.type for one in body} for name, body in module.computations.items()}
    for computation, index, count in _executed(module, module.entry, 1):
        instruction = module.computations[computation][index]
        if not pallas.is_kernel(instruction):
            continue
        cost = pallas.kernel_cost(instruction, types[computation])
        if cost is None:
            unread[instruction.name] += count
            continue
        seconds = max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)
        cycles += count * max(seconds * chip.clock, cost.vector_ops / VECTOR_LANES)
        total += cost.times(count)
    return ClassCost(round(cycles), total.flops, total.bytes), dict(unread)


def by_source(ops: Sequence[Operation], root: str) -> list[tuple[str, str, int]]:
    """Returns (source line, kind of operation, cycles), the most expensive first.

    Args:
      ops: the operations.
      root: folder of the source; the innermost frame below it is named, else the innermost.
    """
    total: Counter[tuple[str, str]] = Counter()
    for operation in ops:
        own = [frame for frame in operation.frames if frame.file.startswith(root)]
        frame = next(iter(own or operation.frames), None)
        location = str(frame._replace(file=frame.file.removeprefix(root).lstrip("/"))) if frame else ""
        total[location, operation.name.rpartition("/")[2]] += operation.cycles
    return [(location, kind, cycles) for (location, kind), cycles in total.most_common()]


def _executed(module: Module, name: str, times: int) -> Iterator[tuple[str, int, int]]:
    """Yields (computation, index, times) of instructions that run by themselves: not those inside a fusion."""
    for index, instruction in enumerate(module.computations.get(name, ())):
        yield name, index, times
        if instruction.opcode in ("while", "call", "conditional"):
            for called, count in hlo.calls(instruction, module):
                yield from _executed(module, called, times * count)


def _hbm_bytes(instruction: Instruction, module: Module, types: Mapping[str, str]) -> int:
    """Returns the bytes that one execution reads from and writes to HBM.

    A fused dynamic slice reads only the slice, and a fused in-place update writes only the update.
    """
    reads = [_in_hbm(types.get(operand, "")) for operand in hlo.operands(instruction)]
    writes = _in_hbm(instruction.type)
    if instruction.opcode == "fusion":
        body = _body(instruction, module)
        reads = [min(size, _fused_reads(body, index, size, module)) for index, size in enumerate(reads)]
        writes = min(writes, _fused_writes(body, module)) if writes else 0
    elif instruction.opcode in ("dynamic-slice", "slice", "gather"):
        reads = [writes]
    return sum(reads) + writes


def _body(fusion: Instruction, module: Module) -> list[Instruction]:
    (name,) = (name for name, _ in hlo.calls(fusion, module))
    return module.computations[name]


def _fused_reads(body: Sequence[Instruction], index: int, size: int, module: Module) -> int:
    """Returns the bytes that a fused computation reads of an operand of `size` bytes."""
    parameter = next((one for one in body if one.opcode == "parameter" and one.rest.startswith(f"{index})")), None)
    if parameter is None:
        return size
    total = 0
    for user in body:
        for position, operand in enumerate(hlo.operands(user)):
            if operand != parameter.name:
                continue
            if user.opcode in ("dynamic-slice", "gather"):
                total += hlo.type_bytes(user.type)
            elif user.opcode == "fusion":
                total += _fused_reads(_body(user, module), position, size, module)
            elif not (user.opcode == "dynamic-update-slice" and position == 0):  # updated in place
                return size
    return total


def _fused_writes(body: Sequence[Instruction], module: Module) -> int:
    """Returns the bytes that a fused computation writes."""
    by_name = {one.name: one for one in body}
    root = body[-1]
    results = [by_name[name] for name in hlo.operands(root)] if root.opcode == "tuple" else [root]
    total = 0
    for one in results:
        while one.opcode == "bitcast":
            one = by_name[hlo.operands(one)[0]]
        if one.opcode == "dynamic-update-slice":
            total += hlo.type_bytes(by_name[hlo.operands(one)[1]].type)
        elif one.opcode == "fusion":
            total += _fused_writes(_body(one, module), module)
        else:
            total += hlo.type_bytes(one.type)
    return total


def _in_hbm(type_: str) -> int:
    """Returns the bytes of the arrays of a type that are in HBM."""
    return sum(hlo.type_bytes(array) for array in hlo.arrays(type_) if hlo.is_in_hbm(array))


def _frames(text: str) -> dict[int, tuple[Frame, ...]]:
    """Returns the source frames of each stack frame id, the innermost first."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] | None = None
    for line in text.splitlines():
        if line in _TABLES:
            rows = tables.setdefault(line, {})
        elif rows is not None and (match := re.match(r"(\d+) (.*)", line)):
            rows[int(match[1])] = match[2]
        elif line:
            rows = None
        if line.startswith(("%", "ENTRY")):
            break
    files, functions, locations, stacks = (tables.get(name, {}) for name in _TABLES)
    fields = {number: dict(re.findall(r"(\w+)=(\d+)", row)) for number, row in locations.items()}
    links = {number: dict(re.findall(r"(\w+)=(\d+)", row)) for number, row in stacks.items()}

    def frame(number: int) -> Frame:
        location = fields[int(links[number]["file_location_id"])]
        file, function = (int(location[name]) for name in ("file_name_id", "function_name_id"))
        return Frame(files[file].strip('"'), functions[function].strip('"'), int(location["line"]))

    def chain(number: int) -> tuple[Frame, ...]:
        result: list[Frame] = []
        while number in links:
            result.append(frame(number))
            number = int(links[number]["parent_frame_id"]) - 1  # the text counts from 1, and 1 is no frame
        return tuple(result)

    return {number: chain(number) for number in links}
