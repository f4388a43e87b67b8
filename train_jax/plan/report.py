"""A run's plan and how it is printed: what a device holds, what each program takes, the cards that have the memory."""

from typing import NamedTuple

from train_jax.plan.hlo import COLLECTIVES
from train_jax.system.memory import format_bytes

GB = 10**9
# Memory that a program can use, in GB.
CARDS = {"T4": 15, "TPU v5e": 16, "L4": 22, "TPU v4": 32, "A100 40": 40, "A100 80": 80, "H200": 140}


class Program(NamedTuple):
    """A compiled program on one device; sizes in bytes.

    Attributes:
      held: arrays that are there while it runs: parameters, optimizer state, its own inputs.
      temp: what it needs beside them.
      output: its results, but for those in the place of donated arguments.
      copies: the part of `temp`, at most, that are float32 copies of half-precision weights (CPU backend alone).
      flops: of matrix products.
      collectives: bytes received by kind.
    """

    name: str
    held: int
    temp: int
    output: int
    copies: int
    flops: float
    collectives: dict[str, int]

    @property
    def total(self) -> int:
        return self.held + self.temp + self.output


class RunPlan(NamedTuple):
    """What a run takes on one device, in bytes; the first program is the training step, if anything trains."""

    device: str
    mesh: dict[str, int]
    trainable: int
    frozen: int
    optimizer: int  # with the moving average, counters and the guard
    batch: int
    programs: list[Program]

    @property
    def peak(self) -> int:
        return max(program.total for program in self.programs)

    @property
    def peak_without_copies(self) -> int:
        """As on a GPU or a TPU, where these copies are not made."""
        return max(program.total - program.copies for program in self.programs)


def report(plan: RunPlan) -> str:
    """The plan as text, all numbers of one device."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"compiled for {plan.device}, mesh {mesh}; all numbers are of one device",
        "",
        f"parameters       {format_bytes(plan.trainable + plan.frozen):>9}"
        f"  (trainable {format_bytes(plan.trainable)}, frozen {format_bytes(plan.frozen)})",
        f"optimizer state  {format_bytes(plan.optimizer):>9}",
        f"batch            {format_bytes(plan.batch):>9}",
        "",
        programs_table(plan),
    ]
    copies = max(program.copies for program in plan.programs)
    if copies:
        lines += [
            "",
            "float32 copies of half-precision weights, which the CPU backend makes for its products and a GPU or TPU "
            f"does not: up to {format_bytes(copies)} of temp",
        ]
    return "\n".join([*lines, "", cards_table(plan)])


def programs_table(plan: RunPlan) -> str:
    """A row a program; FLOPs are of matrix products, collectives the bytes received."""
    kinds = [kind for kind in COLLECTIVES if any(kind in program.collectives for program in plan.programs)]
    copied = any(program.copies for program in plan.programs)
    head = ["", "held", "temp", "output", "total", *["CPU's f32 copies"] * copied, "FLOPs", *kinds]
    rows = [head]
    for program in plan.programs:
        sizes = [program.held, program.temp, program.output, program.total, *[program.copies] * copied]
        exchanged = [format_bytes(program.collectives.get(kind, 0)) for kind in kinds]
        rows.append([program.name, *map(format_bytes, sizes), f"{program.flops:.3g}", *exchanged])
    text = _aligned(rows)
    return text if kinds else f"{text}\nno collectives"


def cards_table(plan: RunPlan) -> str:
    """Whether the largest total fits the memory of common cards; where only the CPU's copies are too much, that."""
    rows = [["card", "memory", "fits"]]
    for card, size in CARDS.items():
        if plan.peak <= size * GB:
            fits = f"yes, {format_bytes(size * GB - plan.peak)} left"
        elif plan.peak_without_copies <= size * GB:
            fits = f"without the CPU's copies: {format_bytes(size * GB - plan.peak_without_copies)} left"
        else:
            fits = f"no, {format_bytes(plan.peak_without_copies - size * GB)} too much"
        rows.append([card, f"{size} GB", fits])
    return _aligned(rows, left=(0, 2))


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
