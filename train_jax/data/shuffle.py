"""The order in which a run reads its examples: another permutation in every epoch, computed for whole batches.

It is the order of `grain.MapDataset.range(size).seed(seed).shuffle().repeat()`. Grain computes one index at a time, in
about 6 microseconds: 1.4 ms for a batch of 256, where a training step of a small flow takes 1.3 ms. Here the batch
takes 0.1 ms (benchmarks/shuffle.py). The orders differ only for sizes 4^k + 1 with k >= 8, for which the block of grain
0.2 is too small, so that it leaves an example out.

The permutation is a block cipher on integers with an even number of bits, repeated until the result is below the size
(cycle walking, Black and Rogaway 2002), so that any position can be computed without those before it. The cipher is
four rounds of Simon (Beaulieu et al. 2013) with keys from C++'s std::seed_seq. It is not cryptographically secure.
"""

import functools

import numpy as np
from jaxtyping import Int, UInt64

ROUNDS = 4
MIN_WORD_BITS = 8  # bits of half a block
# Sizes up to this share one block size. Cycle walks may be long, so the whole permutation is computed at once.
MIN_DOMAIN = 4**MIN_WORD_BITS


class Order:
    """The stream of example indices that a run reads, over all epochs.

    Args:
      size: number of examples, 1 or more.
      seed: seed of the shuffle, 0 or more; None reads every epoch in order.
    """

    def __init__(self, size: int, seed: int | None):
        self._size = size
        # In a chain of grain transformations, the shuffle after the seed has index 1.
        self._seed = None if seed is None else int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def at(self, positions: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """Returns the indices (int64, 0 ... size - 1) of the examples at positions 0, 1, ... of the stream."""
        epochs, indices = np.divmod(np.asarray(positions, np.int64), self._size)
        if self._seed is None or self._size == 1:
            return indices
        out = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            in_epoch, seed = epochs == epoch, (self._seed + epoch) % 2**32
            if self._size <= MIN_DOMAIN:
                out[in_epoch] = _small_permutation(self._size, seed)[indices[in_epoch]]
            else:
                out[in_epoch] = _permuted(indices[in_epoch].astype(np.uint64), self._size, seed)
        return out


def _permuted(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns the images of `indices` under the permutation of 0 ... size - 1 given by `seed` (32 bits)."""
    keys, word_bits = round_keys(seed), ((size - 1).bit_length() + 1) // 2
    permuted = _encrypted(indices, keys, word_bits)
    while (outside := permuted >= size).any():
        permuted[outside] = _encrypted(permuted[outside], keys, word_bits)
    return permuted


@functools.lru_cache(maxsize=16)
def _small_permutation(size: int, seed: int) -> np.ndarray:
    """Returns the whole permutation; each iteration doubles the steps that unfinished cycle walks have taken."""
    permuted = _encrypted(np.arange(MIN_DOMAIN, dtype=np.uint64), round_keys(seed), MIN_WORD_BITS).astype(np.int64)
    while (permuted[:size] >= size).any():
        permuted = np.where(permuted >= size, permuted[permuted], permuted)
    return permuted[:size].copy()


def _encrypted(values: UInt64[np.ndarray, " n"], keys: tuple[int, ...], word_bits: int) -> UInt64[np.ndarray, " n"]:
    """Encrypts blocks of two words of `word_bits` bits, with one round of the cipher for each key."""
    w = word_bits
    mask, word, minus_1, minus_8, minus_2 = (np.uint64(x) for x in (2**w - 1, w, w - 1, w - 8, w - 2))
    left, right = values >> word & mask, values & mask
    for key in keys:
        twice = right << word | right  # shifted right by `word - n`, its low word is `right` rotated left by n
        left, right = right, ((twice >> minus_1 & twice >> minus_8 ^ twice >> minus_2) ^ left ^ np.uint64(key)) & mask
    return left << word | right


@functools.lru_cache(maxsize=16)
def round_keys(seed: int) -> tuple[int, ...]:
    """Returns the ROUNDS 32-bit integers that std::seed_seq{seed} generates (ISO C++, rand.util.seedseq)."""
    n, words = ROUNDS, [0x8B8B8B8B] * ROUNDS
    p = (n - 1) // 2  # p and q of the standard, whose t is equal to p for n = 4
    q = 2 * p

    def mix(x: int) -> int:
        return x ^ x >> 27

    for k in range(n):
        r1 = 1664525 * mix(words[k] ^ words[(k + p) % n] ^ words[k - 1]) % 2**32
        words[(k + p) % n] = (words[(k + p) % n] + r1) % 2**32
        r2 = (
            r1 + (k + seed if k == 1 else max(k, 1))
        ) % 2**32  # k = 0 adds the number of seeds (1), k = 1 also the seed
        words[(k + q) % n] = (words[(k + q) % n] + r2) % 2**32
        words[k] = r2
    for k in range(n):
        r3 = 1566083941 * mix((words[k] + words[(k + p) % n] + words[k - 1]) % 2**32) % 2**32
        words[(k + p) % n] ^= r3
        r4 = (r3 - k) % 2**32
        words[(k + q) % n] ^= r4
        words[k] = r4
    return tuple(words)
