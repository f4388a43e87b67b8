"""Beam search over a toy whose next-word table depends on all earlier words, so that a wrong cache shows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.beam_search import beam_search

pytestmark = pytest.mark.usefixtures("fast_compilation")

VOCAB, LENGTH, PROMPT, EOS = 4, 4, 2, 3
TABLE = jax.random.normal(jax.random.key(0), (2, VOCAB**LENGTH, VOCAB)) * 1.5  # by row, and history as a number


def next_logits(row, history):
    """Logits after a history of words [..., n], which is read as a number in base VOCAB + 1 (0: no word)."""
    code = history @ (VOCAB + 1) ** jnp.arange(LENGTH)
    return TABLE[row, (code * 7919) % TABLE.shape[1]]


def advance(cache, tokens, index):
    """The toy's "model": writes words (plus 1) to the cache and predicts from the words it finds there."""
    written = cache["k"].at[0, :, PROMPT + index, 0, 0].set(tokens + 1)
    row = written[0, :, 0, 0, 0]  # the prompt's first slot tells the row
    return next_logits(row, written[0, :, PROMPT:, 0, 0]), {"k": written}


def search(num_beams, length_penalty, eos_id=EOS):
    cache = jnp.zeros((1, 2, PROMPT + LENGTH, 1, 1), jnp.int32).at[0, :, 0, 0, 0].set(jnp.arange(2))
    first = next_logits(jnp.arange(2), jnp.zeros((2, LENGTH), jnp.int32))
    options = dict(num_beams=num_beams, num_tokens=LENGTH, prompt_slots=PROMPT)
    run = jax.jit(
        lambda eos_id, penalty: beam_search(
            first, {"k": cache}, advance, **options, eos_id=eos_id, length_penalty=penalty
        )
    )
    return jax.tree.map(np.asarray, run(eos_id, length_penalty))


def sum_of_logs(row, words):
    total, history = 0.0, np.zeros(LENGTH, np.int32)
    for index, word in enumerate(words):
        total += float(jax.nn.log_softmax(next_logits(row, history))[word])
        history[index] = word + 1
    return total


@pytest.fixture(scope="module")
def hypotheses():
    """Every word sequence that ends in EOS or at the full length, with its sum of log p in both rows."""
    found = {
        words[: words.index(EOS) + 1] if EOS in words else words
        for words in itertools.product(range(VOCAB), repeat=LENGTH)
    }
    return {words: [sum_of_logs(row, words) for row in range(2)] for words in sorted(found)}


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_enough_beams_are_exhaustive_search(hypotheses, length_penalty):
    tokens, scores, _ = search(108, length_penalty)
    for row in range(2):
        best = max(hypotheses, key=lambda words: hypotheses[words][row] / len(words) ** length_penalty)
        np.testing.assert_array_equal(tokens[row], best + (0,) * (LENGTH - len(best)))
        np.testing.assert_allclose(scores[row], hypotheses[best][row] / len(best) ** length_penalty, rtol=1e-5)


def test_probabilities_of_all_hypotheses_sum_to_one(hypotheses):
    np.testing.assert_allclose(np.exp(list(hypotheses.values())).sum(axis=0), 1.0, rtol=1e-5)


@pytest.mark.parametrize("num_beams", [2, 3])
def test_few_beams_follow_the_plain_algorithm(num_beams):
    tokens, scores, steps = search(num_beams, 1.0)
    plain = [plain_beam_search(row, num_beams, 1.0) for row in range(2)]
    for row, (words, score, _) in enumerate(plain):
        np.testing.assert_array_equal(tokens[row], words + (0,) * (LENGTH - len(words)))
        np.testing.assert_allclose(scores[row], score, rtol=1e-5)
    assert steps == max(taken for *_, taken in plain)


def plain_beam_search(row, num_beams, penalty):
    """The rules at the top of generation/beam_search.py for one row, on lists."""
    open_, closed = [((), 0.0)], []
    for length in range(1, LENGTH + 1):
        extended = [(words + (word,), sum_of_logs(row, words + (word,))) for words, _ in open_ for word in range(VOCAB)]
        extended = sorted(extended, key=lambda pair: -pair[1])[: 2 * num_beams]
        ends = [pair for pair in extended[:num_beams] if pair[0][-1] == EOS or length == LENGTH]
        closed += [(words, total / length**penalty) for words, total in ends]
        closed = sorted(closed, key=lambda pair: -pair[1])[:num_beams]
        open_ = [pair for pair in extended if pair[0][-1] != EOS][:num_beams]
        if len(closed) == num_beams and closed[-1][1] >= open_[0][1] / length**penalty:
            break
    return *closed[0], length


def test_one_beam_is_greedy():
    tokens, scores, _ = search(1, 0.7)
    for row in range(2):
        words, history = [], np.zeros(LENGTH, np.int32)
        while len(words) < LENGTH and EOS not in words:
            words.append(int(jnp.argmax(next_logits(row, history))))
            history[len(words) - 1] = words[-1] + 1
        np.testing.assert_array_equal(tokens[row], words + [0] * (LENGTH - len(words)))
        np.testing.assert_allclose(scores[row], sum_of_logs(row, words) / len(words) ** 0.7, rtol=1e-5)


def test_without_eos_every_hypothesis_has_full_length():
    tokens, scores, steps = search(64, 1.0, eos_id=-1)
    full = {
        words: [sum_of_logs(row, words) for row in range(2)] for words in itertools.product(range(VOCAB), repeat=LENGTH)
    }
    assert steps == LENGTH
    for row in range(2):
        best = max(full, key=lambda words: full[words][row])
        np.testing.assert_array_equal(tokens[row], best)
        np.testing.assert_allclose(scores[row], full[best][row] / LENGTH, rtol=1e-5)
