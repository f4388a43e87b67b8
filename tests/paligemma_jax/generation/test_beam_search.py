"""Beam search over a toy model whose logits depend on all earlier tokens, so that errors of the cache are detected."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.beam_search import beam_search

pytestmark = pytest.mark.usefixtures("fast_compilation")

VOCAB, LENGTH, EOS = 4, 4, 3
TABLE = jax.random.normal(jax.random.key(0), (2, VOCAB**LENGTH, VOCAB)) * 1.5  # by row, and history as a number


def next_logits(row, history):
    """Logits after a history of tokens [..., n], which are the digits of a number in base VOCAB + 1 (0: no token)."""
    code = history @ (VOCAB + 1) ** jnp.arange(LENGTH)
    return TABLE[row, (code * 7919) % TABLE.shape[1]]


def advance(cache, tokens, _, seen, step):
    """The toy model: writes tokens (plus 1) to the cache and predicts from those that each beam attends to."""
    rows, num_beams = tokens.shape
    written = jax.lax.dynamic_update_slice(cache["new"], tokens + 1, (0, step * num_beams))
    histories = jnp.where(seen, written[:, None], 0).reshape(rows, num_beams, LENGTH, num_beams)
    return next_logits(cache["row"][:, None], histories.sum(axis=-1)), cache | {"new": written}


def search(num_beams, length_penalty, eos_id=EOS):
    cache = {"row": jnp.arange(2), "new": jnp.zeros((2, LENGTH * num_beams), jnp.int32)}
    first = next_logits(jnp.arange(2), jnp.zeros((2, LENGTH), jnp.int32))
    options = dict(num_beams=num_beams, num_tokens=LENGTH)
    run = jax.jit(
        lambda eos_id, penalty: beam_search(first, cache, advance, **options, eos_id=eos_id, length_penalty=penalty)
    )
    return jax.tree.map(np.asarray, run(eos_id, length_penalty))


def sum_of_logs(row, sequence):
    total, history = 0.0, np.zeros(LENGTH, np.int32)
    for index, token in enumerate(sequence):
        total += float(jax.nn.log_softmax(next_logits(row, history))[token])
        history[index] = token + 1
    return total


@pytest.fixture(scope="module")
def hypotheses():
    """Every token sequence that ends in EOS or at the full length, with its sum of log p in both rows."""
    sequences = {
        sequence[: sequence.index(EOS) + 1] if EOS in sequence else sequence
        for sequence in itertools.product(range(VOCAB), repeat=LENGTH)
    }
    return {sequence: [sum_of_logs(row, sequence) for row in range(2)] for sequence in sorted(sequences)}


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_enough_beams_are_exhaustive_search(hypotheses, length_penalty):
    tokens, scores, _ = search(108, length_penalty)
    for row in range(2):
        best = max(hypotheses, key=lambda sequence: hypotheses[sequence][row] / len(sequence) ** length_penalty)
        np.testing.assert_array_equal(tokens[row], best + (0,) * (LENGTH - len(best)))
        np.testing.assert_allclose(scores[row], hypotheses[best][row] / len(best) ** length_penalty, rtol=1e-5)


def test_probabilities_of_all_hypotheses_sum_to_one(hypotheses):
    np.testing.assert_allclose(np.exp(list(hypotheses.values())).sum(axis=0), 1.0, rtol=1e-5)


@pytest.mark.parametrize("num_beams", [2, 3])
def test_few_beams_follow_the_plain_algorithm(num_beams):
    tokens, scores, steps = search(num_beams, 1.0)
    plain = [plain_beam_search(row, num_beams, 1.0) for row in range(2)]
    for row, (sequence, score, _) in enumerate(plain):
        np.testing.assert_array_equal(tokens[row], sequence + (0,) * (LENGTH - len(sequence)))
        np.testing.assert_allclose(scores[row], score, rtol=1e-5)
    assert steps == max(taken for *_, taken in plain)


def plain_beam_search(row, num_beams, penalty):
    """The rules at the top of generation/beam_search.py for one row, on lists."""
    open_, closed = [((), 0.0)], []
    for length in range(1, LENGTH + 1):
        longer = [sequence + (token,) for sequence, _ in open_ for token in range(VOCAB)]
        extended = [(sequence, sum_of_logs(row, sequence)) for sequence in longer]
        extended = sorted(extended, key=lambda pair: -pair[1])[: 2 * num_beams]
        ends = [pair for pair in extended[:num_beams] if pair[0][-1] == EOS or length == LENGTH]
        closed += [(sequence, total / length**penalty) for sequence, total in ends]
        closed = sorted(closed, key=lambda pair: -pair[1])[:num_beams]
        open_ = [pair for pair in extended if pair[0][-1] != EOS][:num_beams]
        if len(closed) == num_beams and closed[-1][1] >= open_[0][1] / length**penalty:
            break
    return *closed[0], length


def test_one_beam_is_greedy():
    tokens, scores, _ = search(1, 0.7)
    for row in range(2):
        sequence, history = [], np.zeros(LENGTH, np.int32)
        while len(sequence) < LENGTH and EOS not in sequence:
            sequence.append(int(jnp.argmax(next_logits(row, history))))
            history[len(sequence) - 1] = sequence[-1] + 1
        np.testing.assert_array_equal(tokens[row], sequence + [0] * (LENGTH - len(sequence)))
        np.testing.assert_allclose(scores[row], sum_of_logs(row, sequence) / len(sequence) ** 0.7, rtol=1e-5)


def test_without_eos_every_hypothesis_has_full_length():
    tokens, scores, steps = search(64, 1.0, eos_id=-1)
    full = {
        sequence: [sum_of_logs(row, sequence) for row in range(2)]
        for sequence in itertools.product(range(VOCAB), repeat=LENGTH)
    }
    assert steps == LENGTH
    for row in range(2):
        best = max(full, key=lambda sequence: full[sequence][row])
        np.testing.assert_array_equal(tokens[row], best)
        np.testing.assert_allclose(scores[row], full[best][row] / LENGTH, rtol=1e-5)
