"""The order in which a run reads its examples: another permutation in every epoch, many places at once.

It is the order of `grain.MapDataset.range(size).seed(seed).shuffle().repeat()`. Grain computes one place at a time, at
about 6 microseconds each: 1.4 ms for a batch of 256, where a training step of a small flow takes 1.3 ms. Here the batch
takes 0.1 ms (benchmarks/shuffle.py). The orders differ only for sizes 4^k + 1 with k >= 8: there the block of grain 0.2
is too small, and it leaves an example out.

The permutation is a block cipher on numbers of an even count of bits, repeated until it falls into the range (cycle
walking, Black and Rogaway 2002), so that any place is as near as the first. The cipher has four rounds of Simon
(Beaulieu et al. 2013), its keys are those of C++'s std::seed_seq. It shuffles; it does not protect secrets.
"""

import functools

import numpy as np
from jaxtyping import Int, UInt64

ROUNDS = 4
SMALLEST_WORD = 8  # bits of half a block
SMALL = 4**SMALLEST_WORD  # sizes up to here are as small to the cipher: walks may be long, so all are made at once


class Order:
    """The numbers of the examples, place by place.

    Args:
      size: examples of an epoch, 1 or more.
      seed: of the shuffle, 0 or more; None reads in order, again and again.
    """

    def __init__(self, size: int, seed: int | None):
        self._size = size
        # Position 1 of a chain is where grain's shuffle stands after its seed.
        self._seed = None if seed is None else int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def at(self, places: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """Numbers 0 ... size - 1 of the examples at places 0, 1, ... of the stream, int64."""
        epochs, indices = np.divmod(np.asarray(places, np.int64), self._size)
        if self._seed is None or self._size == 1:
            return indices
        out = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here, seed = epochs == epoch, (self._seed + epoch) % 2**32
            if self._size <= SMALL:
                out[here] = _small_permutation(self._size, seed)[indices[here]]
            else:
                out[here] = _permuted(indices[here].astype(np.uint64), self._size, seed)
        return out


def _permuted(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where the permutation of 0 ... size - 1 that `seed` (32 bits) names puts each of `indices`."""
    keys, word = round_keys(seed), ((size - 1).bit_length() + 1) // 2
    found = _encrypted(indices, keys, word)
    while (outside := found >= size).any():
        found[outside] = _encrypted(found[outside], keys, word)
    return found


@functools.lru_cache(maxsize=16)
def _small_permutation(size: int, seed: int) -> np.ndarray:
    """The whole permutation; every round here doubles how far all the numbers outside have walked."""
    found = _encrypted(np.arange(SMALL, dtype=np.uint64), round_keys(seed), SMALLEST_WORD).astype(np.int64)
    while (found[:size] >= size).any():
        found = np.where(found >= size, found[found], found)
    return found[:size].copy()


def _encrypted(values: UInt64[np.ndarray, " n"], keys: tuple[int, ...], word: int) -> UInt64[np.ndarray, " n"]:
    """Blocks of two words of `word` bits after a round of the cipher for each key."""
    mask, up, by_1, by_8, by_2 = (np.uint64(x) for x in (2**word - 1, word, word - 1, word - 8, word - 2))
    left, right = values >> up & mask, values & mask
    for key in keys:
        twice = right << up | right  # shifted right by `word - n`, its low word is `right` rotated left by n
        left, right = right, ((twice >> by_1 & twice >> by_8 ^ twice >> by_2) ^ left ^ np.uint64(key)) & mask
    return left << up | right


@functools.lru_cache(maxsize=16)
def round_keys(seed: int) -> tuple[int, ...]:
    """ROUNDS numbers of 32 bits as std::seed_seq{seed} generates them (ISO C++, rand.util.seedseq)."""
    n, words = ROUNDS, [0x8B8B8B8B] * ROUNDS
    near = (n - 1) // 2  # p of the standard for n < 7, where t is the same
    far = 2 * near

    def scrambled(x: int) -> int:
        return x ^ x >> 27

    for k in range(n):
        found = 1664525 * scrambled(words[k] ^ words[(k + near) % n] ^ words[k - 1]) % 2**32
        words[(k + near) % n] = (words[(k + near) % n] + found) % 2**32
        found = (found + (k + seed if k == 1 else max(k, 1))) % 2**32  # the count of seeds, the seed, then k alone
        words[(k + far) % n] = (words[(k + far) % n] + found) % 2**32
        words[k] = found
    for k in range(n):
        found = 1566083941 * scrambled((words[k] + words[(k + near) % n] + words[k - 1]) % 2**32) % 2**32
        words[(k + near) % n] ^= found
        found = (found - k) % 2**32
        words[(k + far) % n] ^= found
        words[k] = found
    return tuple(words)
