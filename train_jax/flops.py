"""Floating-point operations of a traced program: those of its matrix products, two for each multiply and add.

Counted before compilation, so that the number does not depend on the backend, and loops over layers count with their
length (XLA's own cost analysis counts a loop's body once).
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Of one execution over all devices together. A `while` of unknown length counts once, of branches the largest."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    name, options = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = options["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[options["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    inner = [product_flops(sub) for sub in _inner(options)]
    if name == "scan":
        return options["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":
        return options["mesh"].size * sum(inner)
    return sum(inner)


def _inner(options: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in options.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item
