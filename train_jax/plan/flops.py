"""FLOPs of matrix products and convolutions in a compiled program, on one device; a multiply-add counts two.

They are counted in the optimized program of one device (hlo.py), after partitioning, fusion and rematerialization. The
body of a loop counts once per iteration, while XLA's own analysis counts it once.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping

from train_jax.plan.hlo import Instruction, Module, calls, dimensions

_OPERANDS = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_GEMM = re.compile(r'"dot_dimension_numbers":(\{[^{}]*\})')  # of a product by a GPU library


def product_flops(module: Module) -> int:
    """Returns the FLOPs of one execution on one device.

    A `while` of unknown length counts once, and of the branches of a `conditional` the most expensive one.
    """
    return computation_flops(module)(module.entry)


def computation_flops(module: Module) -> Callable[[str], int]:
    """Returns a function from the name of a computation to the FLOPs of one execution of it, with its calls."""

    @functools.cache
    def flops_of(name: str) -> int:
        instructions = module.computations.get(name, [])
        types = {instruction.name: instruction.type for instruction in instructions}
        total = 0
        for instruction in instructions:
            inner = [times * flops_of(called) for called, times in calls(instruction, module)]
            branches = instruction.opcode == "conditional"
            total += instruction_flops(instruction, types) + (max(inner, default=0) if branches else sum(inner))
        return total

    return flops_of


def instruction_flops(instruction: Instruction, types: Mapping[str, str]) -> int:
    """Returns the FLOPs of one instruction without its calls; `types` maps instructions of its computation to types."""
    rest = instruction.rest
    if instruction.opcode == "dot":
        contracted = _CONTRACTED.search(rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    elif instruction.opcode == "custom-call" and (gemm := _GEMM.search(rest)):
        axes = [int(axis) for axis in json.loads(gemm[1]).get("lhs_contracting_dimensions", [])]
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, types)
    else:
        return 0
    left = dimensions(types[_OPERANDS.findall(rest)[0]])
    return 2 * math.prod(dimensions(instruction.type)) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, types: Mapping[str, str]) -> int:
    """Returns the FLOPs of a convolution without products with padding or with the gaps of a dilated input."""
    image, kernel, result = _labelled_sizes(instruction, types)
    match = _WINDOW.search(instruction.rest)
    window = {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", match[1] if match else "")}
    flops = 2 * result["b"] * result["f"] * kernel["i"]
    for axis, name in enumerate(sorted(name for name in image if name.isdecimal())):
        low, _ = map(int, window["pad"][axis].split("_")) if "pad" in window else (0, 0)
        stride, kernel_dilation, image_dilation = (
            int(window.get(key, "1" * 9)[axis]) for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        sizes = image[name], kernel[name], result[name]
        flops *= _products_along_axis(*sizes, low, stride, kernel_dilation, image_dilation)
    return flops


def _labelled_sizes(instruction: Instruction, types: Mapping[str, str]) -> list[dict[str, int]]:
    """Returns {label: size} for the axes of image, kernel and result of a convolution."""
    operands = _OPERANDS.findall(instruction.rest)[:2]
    labels = _LABELS.search(instruction.rest)
    assert labels is not None, "XLA writes dim_labels for every convolution"
    shapes = [dimensions(type_) for type_ in (*(types[operand] for operand in operands), instruction.type)]
    return [dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels.groups(), shapes, strict=True)]


@functools.lru_cache(maxsize=1024)
def _products_along_axis(
    image: int, kernel: int, result: int, low: int, stride: int, kernel_dilation: int, image_dilation: int
) -> int:
    """Returns the number of pairs of kernel and result positions, along one axis, that read an element of the image."""
    positions = (out * stride + k * kernel_dilation - low for out in range(result) for k in range(kernel))
    return sum(x % image_dilation == 0 and 0 <= x // image_dilation < image for x in positions)
