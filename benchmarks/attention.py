"""Attention of PaliGemma-3B's tower and decoder, forward and backward: the flash kernel of the device beside plain.

A case of the GPU suite. Rows are one image with a text of 128 tokens: 224, 448 and 896 pixels are 256, 1,024 and 4,096
patches. Errors are those of values and gradients against float32, relative to its largest entry; the flash kernel may
have at most twice that of the plain one, which rounds the same inputs.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import Measurement
from paligemma_jax.models.attention import TokenMask, attention, prefix_lm_mask
from train_jax.system.memory import step_memory

MIB = 2**20


class Shape(NamedTuple):
    """Sizes of one attention: `rows` of `length` tokens, the last `suffix` of them causal; 0 hides no key."""

    rows: int
    length: int
    heads: int
    key_heads: int
    head_dim: int
    suffix: int


TINY = {
    "tower": Shape(1, 40, 2, 2, 8, 0),
    "decoder": Shape(1, 40, 2, 1, 8, 4),
}
SHAPES = {
    f"{tower}, {pixels} px": shape
    for pixels, patches, rows in ((224, 256, 32), (448, 1024, 8), (896, 4096, 2))
    for tower, shape in (
        ("tower", Shape(rows, patches, 16, 16, 72, 0)),
        ("decoder", Shape(rows, patches + 128, 8, 1, 256, 64)),
    )
}


def measure(tiny: bool) -> list[Measurement]:
    """Times both kernels in bfloat16, and compares them with float32."""
    rows = []
    for name, shape in (TINY if tiny else SHAPES).items():
        arrays, mask = inputs(shape)
        exact_inputs = [array.astype(jnp.float32) for array in arrays]
        with jax.default_matmul_precision("highest"):
            exact = compiled("plain", exact_inputs, mask)(*exact_inputs)
        errors = {}
        for kernel in ("plain", "flash"):
            call = compiled(kernel, arrays, mask)
            errors[kernel] = largest_error(call(*arrays), exact)
            memory = step_memory(call)
            rows += [
                Measurement(
                    f"{name}: {kernel}", 1e3 * median_seconds(call, arrays, *((1, 1) if tiny else (7, 5))), "ms"
                ),
                Measurement(f"{name}: {kernel}, memory", (memory.temp if memory else math.nan) / MIB, "MiB"),
            ]
        aim = f"at most {2 * errors['plain'] + 1e-6}"
        rows.append(Measurement(f"{name}: flash, error", errors["flash"], "of the largest entry", aim))
    return rows


def inputs(shape: Shape) -> tuple[list[jax.Array], TokenMask | None]:
    """Returns q, k, v and the output's cotangent in bfloat16, and the mask."""
    rng = np.random.default_rng(0)
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    sizes = [(shape.rows, shape.length, count, shape.head_dim) for count in heads]
    arrays = [jnp.asarray(rng.standard_normal(size, np.float32), jnp.bfloat16) for size in sizes]
    if not shape.suffix:
        return arrays, None
    segment = jnp.ones((shape.rows, shape.length), jnp.int32)
    return arrays, prefix_lm_mask(segment, jnp.arange(shape.length)[None] < segment * (shape.length - shape.suffix))


def compiled(kernel: str, arrays: list[jax.Array], mask: TokenMask | None) -> jax.stages.Compiled:
    """Returns the program of output and gradients of q, k and v."""

    def run(q, k, v, cotangent):
        attend = lambda *qkv: attention(*qkv, mask, scale=q.shape[-1] ** -0.5, kernel=kernel)  # noqa: E731
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(cotangent)

    return jax.jit(run).lower(*arrays).compile()


def largest_error(results: tuple[jax.Array, ...], exact: tuple[jax.Array, ...]) -> float:
    """Returns the largest difference of an output or gradient, relative to the largest entry of its array."""
    pairs = zip(results, exact, strict=True)
    return max(float(jnp.abs(one.astype(jnp.float32) - other).max() / jnp.abs(other).max()) for one, other in pairs)


def median_seconds(call: Callable, arrays: list[jax.Array], rounds: int, calls: int) -> float:
    """Returns the median time of a call over rounds of several calls, after a round of warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        results = [call(*arrays) for _ in range(calls)]
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - began) / calls)
    return float(np.median(seconds[1:]))
