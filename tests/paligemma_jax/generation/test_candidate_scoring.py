"""Candidate likelihoods in one forward pass against one forward pass per candidate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.candidate_scoring import score_candidates
from train_jax.core.errors import UserError

CANDIDATES = np.array([[17, 1, 0, 0], [17, 40, 41, 1], [90, 1, 0, 0], [5, 6, 1, 0], [30, 0, 0, 0]])
MASK = np.arange(4) < np.array([[2], [4], [2], [3], [1]])


@pytest.fixture(scope="module")
def case(big_vision_model, big_vision_case):
    arrays = big_vision_case
    return big_vision_model, arrays["image"], arrays["dec_text"], arrays["dec_mask_input"] > 0


@pytest.fixture(scope="module")
def features(case):
    return jax.jit(lambda model, images: model.encode_image(images)[0])(case[0], jnp.asarray(case[1]))


@pytest.fixture(scope="module")
def separate(case):
    """[B, C] from full forwards, every prompt and candidate a row of its own."""
    model, images, tokens, mask = case
    pairs = [(row, number) for row in range(len(tokens)) for number in range(len(CANDIDATES))]
    length = tokens.shape[1] + CANDIDATES.shape[1]
    text, mask_ar = np.zeros((len(pairs), length), np.int32), np.ones((len(pairs), length), np.int32)
    spans = []
    for at, (row, number) in enumerate(pairs):
        prompt, candidate = tokens[row][mask[row]], CANDIDATES[number][MASK[number]]
        text[at, : len(prompt) + len(candidate)] = [*prompt, *candidate]
        mask_ar[at, : len(prompt)] = 0
        spans.append((len(prompt), candidate))
    batch = jnp.asarray(images[[row for row, _ in pairs]]), jnp.asarray(text), jnp.asarray(mask_ar)
    logits, _ = jax.jit(lambda model, *batch: model(*batch))(model, *batch)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    sums = [sum(log_probs[at, start + i - 1, word] for i, word in enumerate(c)) for at, (start, c) in enumerate(spans)]
    return np.reshape(sums, (len(tokens), len(CANDIDATES)))


def test_equal_to_scoring_every_candidate_alone(case, features, separate):
    model, _, tokens, mask = case
    np.testing.assert_allclose(score_candidates(model, features, tokens, mask, CANDIDATES, MASK), separate, atol=5e-5)


def test_padding_side_and_ids_of_padding_change_nothing(case, features, separate):
    model, _, tokens, mask = case
    left = np.stack(
        [np.concatenate([np.full((~real).sum(), -9), row[real]]) for row, real in zip(tokens, mask, strict=True)]
    )
    scores = score_candidates(model, features, left, np.sort(mask), np.where(MASK, CANDIDATES, 10**6), MASK)
    np.testing.assert_allclose(scores, separate, atol=5e-5)


def test_chunks_and_single_token_candidates(case, features, separate):
    model, _, tokens, mask = case
    scores = score_candidates(model, features, tokens, mask, CANDIDATES[4:, :1], MASK[4:, :1], 7, 50)
    np.testing.assert_allclose(scores, separate[:, 4:], atol=5e-5)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(candidates=CANDIDATES[0]), r"candidates are int32\[4\]"),
        (dict(candidate_mask=MASK[:2]), r"with a mask of \[2, 4\]"),
        (dict(candidate_mask=MASK[:, ::-1]), "candidate 0 is empty or padded before its end"),
        (dict(candidate_mask=MASK & (np.arange(5) != 3)[:, None]), "candidate 3 is empty"),
        (dict(candidates=CANDIDATES + 160), "candidates hold the id 200"),
        (
            dict(image_features=np.zeros((2, 16, 64))),
            r"image_features are float32\[2, 16, 64\]",
        ),
        (dict(mask_input=np.zeros((3, 10))), "row 0 of mask_input marks no real token"),
    ],
)
def test_user_errors(case, features, wrong, sentence):
    model, _, tokens, mask = case
    good = dict(image_features=features, tokens=tokens, mask_input=mask, candidates=CANDIDATES, candidate_mask=MASK)
    with pytest.raises(UserError, match=sentence):
        score_candidates(model, **good | wrong)
