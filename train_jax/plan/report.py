"""The plan of a run, and its text: memory of the state and of each program, and accelerators with enough memory."""

from typing import NamedTuple

from train_jax.plan.cost import ProgramCost
from train_jax.plan.hlo import COLLECTIVES
from train_jax.system.memory import format_bytes

GB = 10**9
# Usable memory of accelerators, in GB.
CARDS = {"T4": 15, "TPU v5e": 16, "L4": 22, "TPU v4": 32, "A100 40": 40, "A100 80": 80, "H200": 140}


class Program(NamedTuple):
    """A compiled program on one device; sizes in bytes.

    Attributes:
      name: of the program.
      held: arrays in memory while it runs: parameters, optimizer state and its inputs.
      temp: temporary memory.
      output: results that do not reuse donated arguments.
      copies: upper bound of the float32 copies of half-precision weights in `temp` (CPU backend only).
      flops: of matrix products.
      collectives: bytes received, by kind.
      cost: estimated time, of a program compiled for TPUs.
    """

    name: str
    held: int
    temp: int
    output: int
    copies: int
    flops: float
    collectives: dict[str, int]
    cost: ProgramCost | None = None

    @property
    def total(self) -> int:
        """Memory in use while the program runs."""
        return self.held + self.temp + self.output


class RunPlan(NamedTuple):
    """Memory of a run on one device, in bytes; the first program is the training step, if anything trains."""

    device: str
    mesh: dict[str, int]
    trainable: int
    frozen: int
    optimizer: int  # with the moving average, counters and the guard
    batch: int
    programs: list[Program]
    model_flops: float | None = None  # of a training step, without padding and recomputation
    remat: str | None = None  # what was chosen for model.remat=auto, as a sentence

    @property
    def peak(self) -> int:
        """Largest total of a program."""
        return max(program.total for program in self.programs)

    @property
    def peak_without_copies(self) -> int:
        """Largest total without `copies`, which a GPU or TPU does not make."""
        return max(program.total - program.copies for program in self.programs)


def report(plan: RunPlan, profile: bool = False) -> str:
    """Returns the text of a plan; all numbers are for one device.

    Args:
      plan: of a run.
      profile: list the most expensive source lines of programs for TPUs.
    """
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"compiled for {plan.device}, mesh {mesh}; all numbers are for one device",
        "",
        f"parameters       {format_bytes(plan.trainable + plan.frozen):>9}"
        f"  (trainable {format_bytes(plan.trainable)}, frozen {format_bytes(plan.frozen)})",
        f"optimizer state  {format_bytes(plan.optimizer):>9}",
        f"batch            {format_bytes(plan.batch):>9}",
        "",
        programs_table(plan),
    ]
    lines += [] if plan.remat is None else ["", plan.remat]
    copies = max(program.copies for program in plan.programs)
    if copies:
        lines += [
            "",
            f"up to {format_bytes(copies)} of temp are float32 copies of half-precision weights, which only the CPU "
            "backend makes",
        ]
    for program in plan.programs:
        if program.cost is not None:
            lines += ["", time_table(program.name, program.cost)]
            if program is plan.programs[0] and plan.model_flops is not None:
                lines.append(utilisation_line(program.cost, plan.model_flops))
            lines += ["", source_table(program.cost)] if profile else []
    return "\n".join([*lines, "", cards_table(plan)])


def time_table(name: str, cost: ProgramCost) -> str:
    """Returns a table of a program's estimated time by class of operation, and what bounds it."""
    total = cost.seconds
    rows = [["", "estimate", "share", "bound", "FLOPs", "HBM"]]
    kernels = {"Pallas": cost.pallas} if cost.pallas.cycles else {}
    for kind, one in {**cost.classes, **kernels}.items():
        seconds = one.cycles / cost.chip.clock
        sizes = [f"{one.flops:.3g}", format_bytes(one.bytes)]
        rows.append([kind, _milliseconds(seconds), f"{seconds / total:.1%}", _milliseconds(cost.bound(one)), *sizes])
    rows.append(["collectives", "", "", _milliseconds(cost.collective_seconds), "", ""])
    source = "by the compiler's estimate"
    if kernels:
        source += f" and our count of Pallas kernels ({_milliseconds(cost.compiler_seconds)} without them)"
    head = (
        f"{name} on {cost.chip.name}: {_milliseconds(total)} {source}, without collectives; products "
        f"at {cost.utilisation:.1%} of the peak"
    )
    calls = ", ".join(f"{call} ({number} times)" for call, number in cost.unestimated.items())
    return "\n".join([head, aligned(rows), *([f"Pallas kernels that could not be read: {calls}"] if calls else [])])


def utilisation_line(cost: ProgramCost, model_flops: float) -> str:
    """Returns the model FLOPs utilisation of a training step, from its model FLOPs on one device."""
    seconds = max(cost.seconds, cost.collective_seconds)
    return (
        f"model FLOPs utilisation at most {model_flops / seconds / cost.chip.flops:.1%} "
        f"({model_flops:.3g} model FLOPs, without recomputation, if no position is padding)"
    )


def source_table(cost: ProgramCost, most: int = 10) -> str:
    """Returns the source lines with the largest estimates."""
    rows = [["share", "source", "operation"]]
    cycles = sum(one.cycles for one in cost.classes.values())
    rows += [[f"{number / cycles:.1%}", location, kind] for location, kind, number in cost.sources[:most]]
    return aligned(rows, left=(1, 2))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def programs_table(plan: RunPlan) -> str:
    """Returns a table with one row for each program: memory, FLOPs of products, and bytes received by collectives."""
    kinds = [kind for kind in COLLECTIVES if any(kind in program.collectives for program in plan.programs)]
    with_copies = any(program.copies for program in plan.programs)
    head = ["", "held", "temp", "output", "total", *["CPU's f32 copies"] * with_copies, "FLOPs", *kinds]
    rows = [head]
    for program in plan.programs:
        sizes = [program.held, program.temp, program.output, program.total, *[program.copies] * with_copies]
        received = [format_bytes(program.collectives.get(kind, 0)) for kind in kinds]
        rows.append([program.name, *map(format_bytes, sizes), f"{program.flops:.3g}", *received])
    text = aligned(rows)
    return text if kinds else f"{text}\nno collectives"


def cards_table(plan: RunPlan) -> str:
    """Returns a table of common accelerators, or of the TPU compiled for: whether the peak fits its memory.

    A run may fit only without the float32 copies of the CPU backend.
    """
    cards = CARDS
    if (cost := plan.programs[0].cost) is not None:
        cards = {f"TPU {cost.chip.name}": cost.chip.memory / GB}
    rows = [["card", "memory", "fits"]]
    for card, size in cards.items():
        if plan.peak <= size * GB:
            fits = f"yes, {format_bytes(int(size * GB) - plan.peak)} left"
        elif plan.peak_without_copies <= size * GB:
            fits = f"without the CPU's copies: {format_bytes(int(size * GB) - plan.peak_without_copies)} left"
        else:
            fits = f"no, {format_bytes(plan.peak_without_copies - int(size * GB))} too much"
        rows.append([card, f"{size:g} GB", fits])
    return aligned(rows, left=(0, 2))


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Returns rows as lines of text with aligned columns; those numbered in `left` are aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
