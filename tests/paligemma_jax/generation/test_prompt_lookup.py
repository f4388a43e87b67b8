"""Drafts from earlier text over a toy model that sees all tokens of a text, and over the goldens: the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.prompt_lookup import NO_TOKEN, decode_with_drafts

pytestmark = pytest.mark.usefixtures("fast_compilation")

ROWS, VOCAB, LENGTH, EOS = 6, 5, 12, 3
NEXT = np.random.default_rng(0).choice(VOCAB, 10_007, p=[0.5, 0.3, 0.1, 0.05, 0.05])  # the next token, by `code`
PROMPT = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 4))
PROMPT[::3, :2] = NO_TOKEN  # padding on the left
PROMPT[1::3, 2:] = NO_TOKEN  # and on the right


def code(rows, histories):
    """Numbers of rows and histories, of tokens plus 1 [..., N] with 0 after the newest."""
    return (histories @ 3 ** np.arange(LENGTH) * 31 + rows * 7) % len(NEXT)


def advance(cache, tokens, indices, seen, step):
    """The toy model: each input sees the tokens (plus 1) of some slots, at the places that their indices say."""
    start = (0, step * tokens.shape[1])
    token = jax.lax.dynamic_update_slice(cache["token"], tokens + 1, start)
    index = jax.lax.dynamic_update_slice(cache["index"], indices, start)
    placed = token[..., None] * jax.nn.one_hot(index, LENGTH, dtype=jnp.int32)
    histories = (seen[..., None] * placed[:, None]).sum(axis=2)
    chosen = jnp.asarray(NEXT)[code(jnp.arange(ROWS)[:, None], histories)]
    return jax.nn.one_hot(chosen, VOCAB), {"token": token, "index": index}


def decoded(num_drafts, eos_id):
    first = jax.nn.one_hot(NEXT[code(np.arange(ROWS), np.zeros((ROWS, LENGTH), int))], VOCAB)
    cache = {name: jnp.zeros((ROWS, LENGTH * (1 + num_drafts)), jnp.int32) for name in ("token", "index")}
    options = dict(num_drafts=num_drafts, num_tokens=LENGTH, eos_id=eos_id, keep_logits=True)
    run = jax.jit(lambda: decode_with_drafts(first, jnp.asarray(PROMPT, jnp.int32), cache, advance, **options))
    return jax.tree.map(np.asarray, run())


def plain(row, num_drafts, eos_id):
    """The answer of one row token by token, and the number of steps that lookup in its text needs."""
    answer = []
    while len(answer) < LENGTH and eos_id not in answer:
        history = np.array([token + 1 for token in answer] + [0] * (LENGTH - len(answer)))
        answer.append(int(NEXT[code(row, history)]))
    steps, done = 1, 1
    while done < len(answer):
        text = [*PROMPT[row], *answer[:done]]
        found = max((i for i in range(len(text) - 1) if text[i] == text[-1]), default=-1)
        drafts = text[found + 1 : found + 1 + num_drafts]
        right = [draft == token for draft, token in zip(drafts, answer[done:], strict=False)] + [False]
        steps, done = steps + 1, done + right.index(False) + 1
    return answer, steps


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("eos_id", [-1, EOS])
def test_drafts_change_no_token_and_are_accepted_where_they_are_right(num_drafts, eos_id):
    tokens, out = decoded(num_drafts, eos_id)
    expected = [plain(row, num_drafts, eos_id) for row in range(ROWS)]
    for row, (answer, _) in enumerate(expected):
        np.testing.assert_array_equal(tokens[row], answer + [0] * (LENGTH - len(answer)))
        np.testing.assert_array_equal(out["logits"][row].argmax(axis=-1)[: len(answer)], answer)
        assert not out["logits"][row, len(answer) :].any()
    assert out["steps"] == max(steps for _, steps in expected) < max(len(answer) for answer, _ in expected)


def test_a_model_decodes_the_same_with_drafts(big_vision_model, big_vision_case):
    case, options = big_vision_case, dict(eos_id=-1, return_out=True, draft_tokens=2)
    prompts = case["image"], case["dec_text"], case["dec_mask_input"]
    tokens, out = generate(big_vision_model, *prompts, 12, **options)
    np.testing.assert_array_equal(tokens, case["dec_tokens"])
    np.testing.assert_allclose(out["logits"], case["dec_logits"], atol=4e-5)
