"""Floating-point operations of a compiled program on one device: those of its products, two for each multiply and add.

They are counted in the program that the device runs (hlo.py), after it was divided over the devices and the compiler
has dropped, merged and recomputed what it wanted, and loops count with their length. XLA's own analysis counts a loop's
body once.
"""

import functools
import json
import math
import re

from train_jax.plan.hlo import Instruction, Module, calls, dimensions

_OPERANDS = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_GEMM = re.compile(r'"dot_dimension_numbers":(\{[^{}]*\})')  # of a library's product: GPUs have them


def product_flops(module: Module) -> int:
    """Of one execution on one device. A `while` of unknown length counts once, of branches the one with most."""

    @functools.cache
    def of(name: str) -> int:
        instructions = module.computations.get(name, [])
        types = {instruction.name: instruction.type for instruction in instructions}
        total = 0
        for instruction in instructions:
            inner = [times * of(called) for called, times in calls(instruction)]
            branches = instruction.opcode == "conditional"
            total += _of(instruction, types) + (max(inner, default=0) if branches else sum(inner))
        return total

    return of(module.entry)


def _of(instruction: Instruction, types: dict[str, str]) -> int:
    """Of one instruction itself; `types` are those of the instructions beside it."""
    rest = instruction.rest
    if instruction.opcode == "dot":
        contracted = _CONTRACTED.search(rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    elif instruction.opcode == "custom-call" and (gemm := _GEMM.search(rest)):
        axes = [int(axis) for axis in json.loads(gemm[1]).get("lhs_contracting_dimensions", [])]
    elif instruction.opcode == "convolution":
        return _of_convolution(instruction, types)
    else:
        return 0
    left = dimensions(types[_OPERANDS.findall(rest)[0]])
    return 2 * math.prod(dimensions(instruction.type)) * math.prod(left[axis] for axis in axes)


def _of_convolution(instruction: Instruction, types: dict[str, str]) -> int:
    """Pairs of an output and a kernel position that meets the padding, or a gap of a dilated input, count nothing."""
    rest = instruction.rest
    image, kernel, result = (dict(zip(labels, sizes, strict=True)) for labels, sizes in _labelled(instruction, types))
    window = found[1] if (found := _WINDOW.search(rest)) else ""
    window = {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", window)}
    flops = 2 * result["b"] * result["f"] * kernel["i"]
    for axis, name in enumerate(sorted(name for name in image if name.isdecimal())):
        low, _ = map(int, window["pad"][axis].split("_")) if "pad" in window else (0, 0)
        stride, spread, gap = (int(window.get(key, "1" * 9)[axis]) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        flops *= _meetings(image[name], kernel[name], result[name], low, stride, spread, gap)
    return flops


def _labelled(instruction: Instruction, types: dict[str, str]):
    """(labels, sizes) of image, kernel and result."""
    operands = _OPERANDS.findall(instruction.rest)[:2]
    return zip(
        _LABELS.search(instruction.rest).groups(),
        map(dimensions, [*(types[operand] for operand in operands), instruction.type]),
        strict=True,
    )


@functools.cache
def _meetings(image: int, kernel: int, result: int, low: int, stride: int, spread: int, gap: int) -> int:
    """Pairs of positions in kernel and result, along one axis, that read a number of the image."""
    places = (out * stride + k * spread - low for out in range(result) for k in range(kernel))
    return sum(place % gap == 0 and 0 <= place // gap < image for place in places)
