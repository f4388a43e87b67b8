"""Adam with 8-bit moments: about two bytes of optimizer state for each parameter instead of eight.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), with the numerics of
bitsandbytes: each step dequantizes the moments to float32, updates them, computes the direction and quantizes them
again. A block is 256 consecutive elements of a leaf in C order. It stores its absolute maximum in float32 and, for each
element, the index of the nearest level of a table that spans seven decades. Weight decay and learning rate are separate
stages of the optax chain.

One deliberate difference from bitsandbytes: in a block whose largest second moment is more than six million times an
element's, the nearest level to that element is 0. Stored as 0, the next step would divide its first moment by `eps`
alone and be hundreds of times too long. Here only an exact 0 is stored as 0; a larger value is rounded to the lowest
level at least, which can only shorten the step.
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
MIN_8BIT_SIZE = 4096  # as in bitsandbytes: quantizing smaller leaves saves too little memory


def dynamic_levels(signed: bool) -> Float32[np.ndarray, "256"]:
    """Returns the levels of the dynamic 8-bit type in ascending order, from -0.993 (signed) or 0 (unsigned) to 1.

    Each decade from 1e-7..1e-6 to 0.1..1 is divided into equal cells, twice as many as the decade below (1 to 64
    signed, 2 to 128 unsigned), and the middle of each cell is a level (Dettmers, 2016, arXiv 1511.04561, with the
    tables of bitsandbytes 0.50). The levels 0 and 1 complete the 256; -1 is not a level.
    """
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        cells = _cells(decade, signed)
        middles = 10.0 ** (decade - DECADES) * (1 + 9 * (np.arange(cells) + 0.5) / cells)
        levels += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(levels, np.float64)).astype(np.float32)


def _cells(decade: int, signed: bool) -> int:
    """Returns the number of levels in a decade for one sign; decade 0 is the lowest."""
    return 2**decade if signed else 2 ** (decade + 1)


_LEVELS = {signed: dynamic_levels(signed) for signed in (True, False)}


def _code_of_zero(signed: bool) -> int:
    return int(np.searchsorted(_LEVELS[signed], 0.0))


class Quantized(NamedTuple):
    """A float32 array in 8 bits: element = level[code] * absmax of its block.

    The codes have the array's shape, so that they are sharded like it.
    """

    codes: UInt8[Array, "..."]  # shape of the parameter
    absmax: Float32[Array, "..."]  # one for each block: shape of `_to_blocks` without the last dimension


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`; each moment is a `Quantized`, or a float32 array for a small leaf."""

    count: Int32[Array, ""]
    mu: Any
    nu: Any


def quantize(values: Float32[Array, "..."], signed: bool) -> Quantized:
    """Rounds each value to the nearest level; a tie rounds towards 0, and a block of zeros stays zero.

    Args:
      values: any non-empty shape; blocks are consecutive in C order, and the last one may be short.
      signed: False for values of 0 or more, of which only an exact 0 is stored as 0 (see the module's docstring).
    """
    blocks = _to_blocks(values)
    absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scaled = jnp.where(absmax > 0, blocks / absmax, 0.0)
    rank = _rank(jnp.abs(scaled), signed)
    if signed:
        zero = _code_of_zero(signed)
        codes = jnp.where(scaled < 0, zero - jnp.minimum(rank, zero), zero + rank)  # -1 is not a level
    else:
        codes = jnp.where(blocks > 0, jnp.maximum(rank, 1), rank)
    return Quantized(_from_blocks(codes.astype(jnp.uint8), values.shape), absmax.squeeze(-1))


def _rank(magnitudes: Float32[Array, "..."], signed: bool) -> Int32[Array, "..."]:
    """Returns the index of the nearest level at or above 0, for magnitudes from 0 to 1.

    The index is the number of midpoints between neighbouring levels below the magnitude. Within a decade these are the
    evenly spaced edges of the cells. A binary search in the table has the same result, but XLA does not fuse its eight
    look-ups and takes 38 bytes of temporary memory for each parameter.
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
    """Returns the float32 array of quantized values, in the shape of the codes."""
    values = jnp.asarray(_LEVELS[signed])[_to_blocks(quantized.codes)] * quantized.absmax[..., None]
    return _from_blocks(values, quantized.codes.shape)


def _quantized_zeros(shape: tuple[int, ...], signed: bool) -> Quantized:
    """Returns `quantize` of zeros without computing it: XLA would fold that at compile time, element by element."""
    blocks = jax.eval_shape(_to_blocks, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return Quantized(jnp.full(shape, _code_of_zero(signed), jnp.uint8), jnp.zeros(blocks[:-1]))


def _to_blocks(array: Array) -> Array:
    """Reshapes an array to blocks: [..., d] -> [..., d / 256, 256].

    `d` joins as few of the last dimensions as give whole blocks. If all dimensions together do not, the result is
    [n, 256], padded with zeros. The blocks are those of the flat array in either case, but the leading dimensions keep
    their sharding, while XLA gathers flattened ones.
    """
    for axis in reversed(range(array.ndim)):
        joined = math.prod(array.shape[axis:])
        if joined % BLOCK == 0:
            return array.reshape(*array.shape[:axis], joined // BLOCK, BLOCK)
    return jnp.pad(array.reshape(-1), (0, -array.size % BLOCK)).reshape(-1, BLOCK)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Inverts `_to_blocks` for an array of `shape`."""
    size = math.prod(shape)
    return blocks.reshape(shape) if blocks.size == size else blocks.reshape(-1)[:size].reshape(shape)


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, min_8bit_size: int = MIN_8BIT_SIZE
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` with 8-bit moments for large leaves.

    The direction is Adam's for the moments before rounding, in float32:

        (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Masking a whole update restores codes and scales bit for bit.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the square root of the second moment.
      min_8bit_size: leaves with fewer elements keep float32 moments; stacked layers are one leaf.
    """

    def init(params):
        def zeros(leaf, signed):
            return _quantized_zeros(leaf.shape, signed) if leaf.size >= min_8bit_size else jnp.zeros(leaf.shape)

        mu = jax.tree.map(lambda leaf: zeros(leaf, True), params)
        nu = jax.tree.map(lambda leaf: zeros(leaf, False), params)
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        bias1, bias2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

        def update_leaf(gradient, stored_mu, stored_nu):
            mu = b1 * _load(stored_mu, True) + (1 - b1) * gradient
            nu = b2 * _load(stored_nu, False) + (1 - b2) * gradient**2
            direction = mu / bias1 / (jnp.sqrt(nu / bias2) + eps)
            return direction, _store(mu, True, like=stored_mu), _store(nu, False, like=stored_nu)

        gradients, tree = jax.tree.flatten(updates)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        results = [_by_layer(update_leaf, *leaf) for leaf in zip(gradients, *moments, strict=True)]
        directions, mu, nu = (tree.unflatten(column) for column in zip(*results, strict=True))
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _by_layer(update_leaf: Callable, gradient: Array, mu: Quantized | Array, nu: Quantized | Array) -> tuple:
    """Computes `update_leaf(gradient, mu, nu)`, one layer after another and in place if the leaf stacks layers.

    Then only one layer's float32 moments are in memory at a time; other leaves need all of theirs. The dimension of
    layers is never sharded. The rows of a matrix may be, so slicing them would gather them.
    """
    gradient = gradient.astype(jnp.float32)
    if not (isinstance(mu, Quantized) and gradient.ndim > 2 and mu.absmax.ndim > 1):  # no stack, or partial blocks
        return update_leaf(gradient, mu, nu)

    def update_layer(index, stacks):
        layer = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)
        results = update_leaf(*layer)
        return jax.tree.map(lambda s, result: jax.lax.dynamic_update_index_in_dim(s, result, index, 0), stacks, results)

    return jax.lax.fori_loop(0, len(gradient), update_layer, (gradient, mu, nu))


def _one_minus_power(decay: float, count: Int32[Array, ""]) -> Float32[Array, ""]:
    """Returns 1 - decay^count; computed directly in float32, 1 - 0.999^5 would have a relative error of 1e-5."""
    return -jnp.expm1(count * math.log(decay)) if decay else jnp.ones(())


def _load(moment: Quantized | Array, signed: bool) -> Array:
    """Returns a stored moment in float32."""
    return dequantize(moment, signed) if isinstance(moment, Quantized) else moment


def _store(moment: Array, signed: bool, like: Quantized | Array) -> Quantized | Array:
    """Returns a float32 moment in the form of the stored moment `like`."""
    return quantize(moment, signed) if isinstance(like, Quantized) else moment
