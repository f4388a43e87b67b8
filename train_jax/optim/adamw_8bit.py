"""Adam's direction with 8-bit moments: two bytes and a little of state a parameter instead of eight.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), numerically as bitsandbytes
does it: the moments become float32, take the gradient in, give the direction, and are rounded again. A block is 256
neighbours of the leaf in C order; it keeps its largest magnitude in float32 and, for each element, the index of the
nearest level of a table that spans seven decades. Weight decay and the rate are the business of the chain around it.

One thing differs from bitsandbytes, on purpose. Next to a second moment more than six million times its size, an
element's own is nearer to 0 than to the lowest level. Were it stored as 0, the next step would divide a first moment
that is not 0 by `eps`: a step hundreds of times too long. So only an exact 0 is stored as 0 here, and whatever lies
above it as the lowest level at least, which can only shorten the step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32, UInt8

BLOCK = 256
DECADES = 7
MIN_8BIT_SIZE = 4096  # as in bitsandbytes: the bytes of smaller leaves are not worth their rounding


def dynamic_levels(signed: bool) -> Float32[np.ndarray, "256"]:
    """The ascending levels of the dynamic 8-bit type, from -1 (signed) or 0 (unsigned) to 1.

    Each decade from 1e-7..1e-6 to 0.1..1 is cut into equal cells, twice as many as the decade below it has (1 to 64
    signed, 2 to 128 unsigned), and the middle of each cell is a level (Dettmers, 2016, arXiv 1511.04561, with the
    tables of bitsandbytes 0.50). 0 and 1 complete the 256; of -1 there is none, the lowest is -0.993.
    """
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        cells = _cells(decade, signed)
        middles = 10.0 ** (decade - DECADES) * (1 + 9 * (np.arange(cells) + 0.5) / cells)
        levels += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(levels, np.float64)).astype(np.float32)


def _cells(decade: int, signed: bool) -> int:
    """Levels of a decade, counted from the lowest, and of one sign."""
    return 2**decade if signed else 2 ** (decade + 1)


_LEVELS = {signed: dynamic_levels(signed) for signed in (True, False)}


def _code_of_zero(signed: bool) -> int:
    return int(np.searchsorted(_LEVELS[signed], 0.0))


class Quantized(NamedTuple):
    """A float32 array in 8 bits: element = level[code] * absmax of its block.

    The codes have the array's own shape, so that they are sharded as it is.
    """

    codes: UInt8[Array, "..."]  # of the parameter's shape
    absmax: Float32[Array, "..."]  # one a block: the shape of `_to_blocks` without its last dimension


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`; a moment is a `Quantized`, or a float32 array of the leaf's shape if small."""

    count: Int32[Array, ""]
    mu: Any
    nu: Any


def quantize(values: Float32[Array, "..."], signed: bool) -> Quantized:
    """Rounds to the nearest level, of two equally near to the one nearer to 0; a block of zeros stays zeros.

    Args:
      values: any shape but empty; blocks run over it in C order, and the last one may be short.
      signed: False for values of 0 or more, of which only an exact 0 becomes 0 (see the module's docstring).
    """
    blocks = _to_blocks(values)
    absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scaled = jnp.where(absmax > 0, blocks / absmax, 0.0)
    rank = _rank(jnp.abs(scaled), signed)
    if signed:
        zero = _code_of_zero(signed)
        codes = jnp.where(scaled < 0, zero - jnp.minimum(rank, zero), zero + rank)  # there is no -1
    else:
        codes = jnp.where(blocks > 0, jnp.maximum(rank, 1), rank)
    return Quantized(_from_blocks(codes.astype(jnp.uint8), values.shape), absmax.squeeze(-1))


def _rank(magnitudes: Float32[Array, "..."], signed: bool) -> Int32[Array, "..."]:
    """How many midpoints of neighbouring levels, from 0 upwards, lie below a number from 0 to 1: its nearest level.

    Counted decade by decade, where they are the evenly spaced edges of the cells. A search in the table would say the
    same, but XLA does not fuse its eight look-ups: 38 bytes of temporary memory a parameter.
    """
    levels = _LEVELS[signed][_code_of_zero(signed) :]
    rank = (magnitudes > (levels[-2] + levels[-1]) / 2).astype(jnp.int32)
    first = 1  # rank of the decade's first level
    for decade in range(DECADES):
        cells, low = _cells(decade, signed), 10.0 ** (decade - DECADES)
        edges = jnp.ceil((magnitudes - low) / (9 * low / cells)) - 1
        rank += (magnitudes > (levels[first - 1] + levels[first]) / 2).astype(jnp.int32)
        rank += jnp.clip(edges, 0, cells - 1).astype(jnp.int32)
        first += cells
    return rank


def dequantize(quantized: Quantized, signed: bool) -> Float32[Array, "..."]:
    """The array that `quantize` rounded, in the shape of the codes."""
    values = jnp.asarray(_LEVELS[signed])[_to_blocks(quantized.codes)] * quantized.absmax[..., None]
    return _from_blocks(values, quantized.codes.shape)


def _quantized_zeros(shape: tuple[int, ...], signed: bool) -> Quantized:
    """`quantize` of zeros, written down: XLA would compute it while compiling, element by element."""
    blocks = jax.eval_shape(_to_blocks, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return Quantized(jnp.full(shape, _code_of_zero(signed), jnp.uint8), jnp.zeros(blocks[:-1]))


def _to_blocks(array: Array) -> Array:
    """[..., d] -> [..., d / 256, 256] after joining as few of the last dimensions into `d` as hold whole blocks.

    Where even all of them do not, [n, 256] padded with zeros. The blocks are those of the flat array either way, but
    dimensions that stay keep their sharding, while XLA gathers what is flattened.
    """
    for axis in reversed(range(array.ndim)):
        joined = math.prod(array.shape[axis:])
        if joined % BLOCK == 0:
            return array.reshape(*array.shape[:axis], joined // BLOCK, BLOCK)
    return jnp.pad(array.reshape(-1), (0, -array.size % BLOCK)).reshape(-1, BLOCK)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_to_blocks` for an array of `shape`."""
    size = math.prod(shape)
    return blocks.reshape(shape) if blocks.size == size else blocks.reshape(-1)[:size].reshape(shape)


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, min_8bit_size: int = MIN_8BIT_SIZE
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the moments of large leaves in 8 bits.

    The direction is that of Adam for the moments before they are rounded,

        (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),

    in float32. Masking a whole update restores codes and scales bit for bit.

    Args:
      b1, b2: decay of the first and of the second moment, 0 or more, below 1.
      eps: added to the root of the second moment.
      min_8bit_size: leaves of fewer elements (a leaf that stacks layers counts as one) keep float32 moments.
    """

    def init(params):
        def zeros(leaf, signed):
            return _quantized_zeros(leaf.shape, signed) if leaf.size >= min_8bit_size else jnp.zeros(leaf.shape)

        mu = jax.tree.map(lambda leaf: zeros(leaf, True), params)
        nu = jax.tree.map(lambda leaf: zeros(leaf, False), params)
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        bias1, bias2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

        def one(gradient, stored_mu, stored_nu):
            mu = b1 * _load(stored_mu, True) + (1 - b1) * gradient
            nu = b2 * _load(stored_nu, False) + (1 - b2) * gradient**2
            direction = mu / bias1 / (jnp.sqrt(nu / bias2) + eps)
            return direction, _store(mu, True, like=stored_mu), _store(nu, False, like=stored_nu)

        gradients, tree = jax.tree.flatten(updates)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        results = [_by_layer(one, *leaf) for leaf in zip(gradients, *moments, strict=True)]
        directions, mu, nu = (tree.unflatten(column) for column in zip(*results, strict=True))
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _by_layer(one: Callable, gradient: Array, mu: Quantized | Array, nu: Quantized | Array) -> tuple:
    """`one(gradient, mu, nu)`, for a stack of layers one after another and in place.

    Bounds the float32 moments in memory to those of a layer; other leaves have theirs whole for the time of the step.
    A dimension of layers is not sharded, while the rows of a matrix may be, and cutting those would gather them.
    """
    gradient = gradient.astype(jnp.float32)
    if not (isinstance(mu, Quantized) and gradient.ndim > 2 and mu.absmax.ndim > 1):  # no stack, or not of whole blocks
        return one(gradient, mu, nu)

    def layer(index, stacks):
        parts = one(*jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks))
        return jax.tree.map(lambda s, part: jax.lax.dynamic_update_index_in_dim(s, part, index, 0), stacks, parts)

    return jax.lax.fori_loop(0, len(gradient), layer, (gradient, mu, nu))


def _one_minus_power(decay: float, count: Int32[Array, ""]) -> Float32[Array, ""]:
    """1 - decay^count; taken in float32 as it stands, 1 - 0.999^5 would be wrong by 1e-5 of itself."""
    return -jnp.expm1(count * math.log(decay)) if decay else jnp.ones(())


def _load(moment: Quantized | Array, signed: bool) -> Array:
    """A stored moment in float32."""
    return dequantize(moment, signed) if isinstance(moment, Quantized) else moment


def _store(moment: Array, signed: bool, like: Quantized | Array) -> Quantized | Array:
    """A float32 moment in the form in which it was stored before."""
    return quantize(moment, signed) if isinstance(like, Quantized) else moment
