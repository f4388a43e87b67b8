"""Samplers on given logits: support sets, frequencies, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.token_sampling import make_sampler, nucleus_mask, row_keys, sample_tokens, top_k_mask
from train_jax.core.errors import UserError

LOGITS = np.log([0.1, 0.4, 0.05, 0.3, 0.15]).astype(np.float32)
DRAWS = 4000


def frequencies(name, **options):
    keys = row_keys(jax.random.key(0), DRAWS)
    tokens = sample_tokens(make_sampler(name, **options), jnp.tile(LOGITS, (DRAWS, 1)), keys, 0)
    return np.bincount(tokens, minlength=5) / DRAWS


def assert_drawn_from(frequencies, probabilities):
    probabilities = np.asarray(probabilities) / np.sum(probabilities)
    deviation = np.sqrt(probabilities * (1 - probabilities) / DRAWS)
    assert np.all(np.abs(frequencies - probabilities) <= 4 * deviation)  # nothing at all where the probability is 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_an_exponent_of_the_probabilities(temperature):
    assert_drawn_from(frequencies("temperature", temperature=temperature), np.exp(LOGITS / temperature))


def test_temperature_zero_is_greedy():
    for name in ("temperature", "top_k", "nucleus"):
        np.testing.assert_array_equal(frequencies(name, temperature=0), [0, 1, 0, 0, 0])


def test_top_k_and_nucleus_renormalize():
    assert_drawn_from(frequencies("top_k", top_k=2), [0, 0.4, 0, 0.3, 0])
    assert_drawn_from(frequencies("nucleus", top_p=0.8), [0, 0.4, 0, 0.3, 0.15])
    # At temperature 1/2 the probabilities are 16, 9, 2.25, ... of 28.5: two tokens have 0.87 of the mass.
    assert_drawn_from(frequencies("nucleus", top_p=0.8, temperature=0.5), [0, 16, 0, 9, 0])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, range(5)),
    ],
)
def test_nucleus_is_the_smallest_set_of_that_mass(top_p, kept):
    np.testing.assert_array_equal(np.flatnonzero(nucleus_mask(jnp.asarray(LOGITS)[None], top_p)[0]), list(kept))


def test_lower_ids_win_ties():
    logits = jnp.array([[0.0, 1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(top_k_mask(logits, 2)[0], [False, True, True, False, False])
    np.testing.assert_array_equal(nucleus_mask(logits, 0.5)[0], [False, True, True, False, False])
    assert top_k_mask(logits, 50).all()


def test_nucleus_of_mass_one_keeps_tokens_that_rounding_hides():
    logits = jnp.array([[0.0, -40.0, -50.0]])  # the running sum is 1 after the first token
    assert nucleus_mask(logits, 1.0).all()
    np.testing.assert_array_equal(nucleus_mask(logits, 0.999)[0], [True, False, False])


def test_steps_and_rows_use_different_keys():
    keys = row_keys(jax.random.key(1), 64)
    draws = [sample_tokens(make_sampler("temperature"), jnp.zeros((64, 1000)), keys, step) for step in range(2)]
    assert len(set(np.concatenate(draws).tolist())) > 110  # 128 draws of 1000: 120 different ones on average
    again = sample_tokens(make_sampler("temperature"), jnp.zeros((3, 1000)), keys[:3], 0)
    np.testing.assert_array_equal(again, draws[0][:3])


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("nucleus", dict(top_k=3), "'nucleus' takes temperature, top_p, not top_k: .* choose sampler 'top_k'"),
        ("temperature", dict(temperature=-1), "temperature is -1"),
        ("top_k", dict(top_k=0), "top_k is 0"),
        ("beam", dict(num_beams=0), "num_beams is 0"),
        ("greedy", dict(draft_tokens=-1), "draft_tokens is -1"),
        ("nucleus", dict(top_p=0.0), "top_p is 0.0"),
        ("nucleus", dict(top_p=1.5), "top_p is 1.5"),
        ("temperature", dict(temperature=float("nan")), "temperature is nan, expected a finite number"),
        ("top_k", dict(top_k=2.5), "top_k is 2.5, expected a whole number"),
        ("beam", dict(length_penalty=float("inf")), "length_penalty is inf, expected a finite number"),
    ],
)
def test_user_errors(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_sampler(name, **options)
