"""Counts the work of a Pallas kernel for TPUs, which the compiler's estimate of a program leaves out.

The program's text holds every kernel as a module of Mosaic, the language that Pallas is compiled to. Its operations are
counted as they are written there: what Mosaic adds or removes later (layouts, spills) is not in it.
"""

import base64
import functools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from train_jax.plan import hlo
from train_jax.plan.hlo import Instruction

_BODY = re.compile(r'"custom_call_config":\{"body":"([^"]*)"')
_CONTRACTED = re.compile(r"<\[(\d+)\]")  # the first entry of the dimension numbers of a product
_SERIALIZED = "stable_mosaic."
_INTEGER_OPS = {"arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul}
_TILE = (8, 128)  # of a vector register: sublanes, lanes


class KernelCost(NamedTuple):
    """The work of one call of a kernel.

    Attributes:
      flops: of matrix products.
      bytes: that move between HBM and the blocks of the kernel.
      vector_ops: elements of arithmetic on vectors, with the padding of registers: a multiply-add counts two, a
        transcendental function one.
    """

    flops: int
    bytes: int
    vector_ops: int

    def __add__(self, other: "KernelCost") -> "KernelCost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return KernelCost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: int) -> "KernelCost":
        """Returns the cost of several calls."""
        return KernelCost(*(number * value for value in self))


NOTHING = KernelCost(0, 0, 0)


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction calls a Pallas kernel."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest


def kernel_cost(instruction: Instruction, types: Mapping[str, str]) -> KernelCost | None:
    """Returns the cost of a call of a kernel; None if its module cannot be read.

    Args:
      instruction: the call.
      types: of the instructions of its computation, by name.
    """
    body = _BODY.search(instruction.rest)
    if body is None:
        return None
    moved = [types.get(name, "") for name in hlo.operands(instruction)] + hlo.arrays(instruction.type)
    in_hbm = [hlo.is_in_hbm(type_) for type_ in moved]
    return _module_cost(body[1], tuple(in_hbm))


@functools.lru_cache(maxsize=256)  # a program with unrolled layers calls the same few kernels many times
def _module_cost(body: str, in_hbm: tuple[bool, ...]) -> KernelCost | None:
    """Returns the cost of a serialized module, whose arguments and results are in HBM or on the chip."""
    try:
        from jax._src.lib import tpu  # pyright: ignore[reportPrivateImportUsage]  (JAX exports the dialect nowhere)
    except ImportError:
        return None
    from jax.extend.mlir import ir

    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        module = ir.Module.parse(base64.b64decode(body))
        functions = {_text(one, "sym_name"): one for one in module.body.operations}
        kernel = next(one for one in module.body.operations if "iteration_bounds" in one.attributes)
        bounds: Any = kernel.attributes["iteration_bounds"]
        grid = [max(int(size), 1) for size in bounds]  # an unknown size is negative
        steps = _region_cost(kernel.regions).times(math.prod(grid))
        return steps + KernelCost(0, _traffic(kernel, functions, grid, in_hbm), 0)


def _region_cost(regions: Sequence[Any]) -> KernelCost:
    """Returns the cost of the operations of regions, one after another, without HBM."""
    return sum((_cost(one) for region in regions for block in region for one in block.operations), NOTHING)


def _cost(op: Any) -> KernelCost:
    """Returns the cost of an operation with the regions in it. A branch counts as taken, the more expensive one."""
    name = op.operation.name.removeprefix(_SERIALIZED)
    if name == "scf.if":
        return max((_region_cost([region]) for region in op.regions), key=sum)
    if name == "scf.for":
        return _region_cost(op.regions).times(_trips(op))
    inner = _region_cost(op.regions)
    if name == "tpu.matmul":
        left, result = _shape(op.operands[0]), _shape(op.results[0])
        contracted = _CONTRACTED.search(str(op.attributes["dimension_numbers"]))
        assert left and result and contracted
        return KernelCost(2 * math.prod(result) * left[int(contracted[1])], 0, 0)
    if name.startswith(("vector.multi_reduction", "vector.reduction", "tpu.reduce")):
        return inner + KernelCost(0, 0, _lanes(op.operands[0]))
    if name.startswith(("arith.", "math.")) and name != "arith.constant" and len(op.results):
        return inner + KernelCost(0, 0, _lanes(op.results[0]))
    return inner


def _trips(loop: Any) -> int:
    """Returns the iterations of a loop; 1 if they are unknown."""
    low, high, step = (_integer(bound) for bound in list(loop.operands)[:3])
    return 1 if low is None or high is None or not step else max(-(-(high - low) // step), 0)


def _integer(value: Any) -> int | None:
    """Returns the value of an integer that is computed from constants; None for another."""
    name = getattr(value.owner, "name", "").removeprefix(_SERIALIZED)
    if name == "arith.constant":
        return int(_text(value.owner, "value").partition(":")[0])
    parts = [_integer(part) for part in value.owner.operands] if name in _INTEGER_OPS else [None]
    return None if None in parts else _INTEGER_OPS[name](*parts)


def _traffic(kernel: Any, functions: Mapping[str, Any], grid: Sequence[int], in_hbm: Sequence[bool]) -> int:
    """Returns the bytes that move between HBM and blocks: a block moves when its index changes from step to step."""
    if "window_params" not in kernel.attributes:
        return 0
    windows = list(kernel.attributes["window_params"])
    arguments = list(kernel.regions[0].blocks[0].arguments)[len(grid) :]
    arguments = arguments[_number(kernel, "scalar_prefetch") :]
    in_hbm = list(in_hbm)[-len(windows) :]  # operands before the first window are scalars
    total = 0
    for window, argument, moved in zip(windows, arguments, in_hbm, strict=False):
        if moved and "transform_indices" in window:
            function = functions[str(window["transform_indices"]).lstrip("@")]
            steps = math.prod(grid[: _innermost_axis(function, len(grid))])
            total += steps * hlo.type_bytes(_as_hlo(str(argument.type)))
    return total


def _innermost_axis(function: Any, axes: int) -> int:
    """Returns the number of axes of the grid up to the last one that a block's index depends on."""
    block = function.regions[0].blocks[0]
    depends = {argument: index + 1 for index, argument in enumerate(list(block.arguments)[:axes])}
    for op in block.operations:
        deepest = max((depends.get(value, 0) for value in op.operands), default=0)
        if not len(op.results):
            return deepest  # the return
        depends |= dict.fromkeys(op.results, deepest)
    return axes


def _as_hlo(type_: str) -> str:
    """Returns a type such as memref<8x128xi32, ...> as s32[8,128]."""
    match = re.match(r"\w+<((?:\d+x)*)(\w+)", type_)
    assert match is not None
    return f"{re.sub('^i', 's', match[2])}[{match[1][:-1].replace('x', ',')}]"


def _shape(value: Any) -> list[int] | None:
    """Returns the shape of a vector, None for a scalar."""
    text = str(value.type)
    return [int(size) for size in re.findall(r"(\d+)x", text)] if text.startswith("vector<") else None


def _lanes(value: Any) -> int:
    """Returns the elements of the registers that a vector fills; 0 for a scalar."""
    shape = _shape(value)
    if not shape:
        return 0
    *rows, last = shape if len(shape) > 1 else (1, *shape)
    rows[-1] = -(-rows[-1] // _TILE[0]) * _TILE[0]
    return math.prod(rows) * -(-last // _TILE[1]) * _TILE[1]


def _text(op: Any, name: str) -> str:
    return str(op.attributes[name]).strip('"')


def _number(op: Any, name: str) -> int:
    return int(_text(op, name).partition(":")[0]) if name in op.attributes else 0
