"""Gemma 2: parity with transformers' golden case, and the window in training, prefill and decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.generation.candidate_scoring import score_candidates
from paligemma_jax.generation.generate import generate
from paligemma_jax.losses import token_cross_entropy
from paligemma_jax.models.attention import prefix_mask
from paligemma_jax.models.gemma import Gemma, GemmaConfig, sliding_mask
from paligemma_jax.models.paligemma import positions_of
from train_jax.core import param_tree

pytestmark = pytest.mark.usefixtures("fast_compilation")

STEPS = 12


@pytest.fixture(scope="module")
def forward(gemma_2_model, gemma_2_case):
    return gemma_2_model(**gemma_2_case.inputs)


# Tolerances of the golden README.


def test_config_is_read(gemma_2_model):
    decoder = gemma_2_model.config.decoder
    assert (decoder.attn_softcap, decoder.final_softcap, decoder.sliding_window) == (4.0, 3.0, 6)
    assert decoder.query_scale == 24**-0.5 and decoder.post_norms
    assert (decoder.depth, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 4, 2, 16)


def test_features_and_logits_equal_transformers(forward, gemma_2_case):
    logits, out = forward
    stored, real = gemma_2_case.stored, gemma_2_case.real
    np.testing.assert_allclose(out["vision/encoded"], stored["vision_last_hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out["image_features"], stored["image_features"], rtol=0, atol=1e-4)
    expected = stored["logits"][:, gemma_2_case.patches :]
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=2e-4)


def test_loss_equals_transformers(forward, gemma_2_model, gemma_2_case):
    case, table = gemma_2_case, gemma_2_model.decoder.embed_tokens.embedding[...]
    cap = gemma_2_model.config.decoder.final_softcap
    total = token_cross_entropy(forward[1]["hidden"], table, case.targets, case.weights, softcap=cap)
    np.testing.assert_allclose(total / case.weights.sum(), case.stored["loss"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, eos", [("gen", False), ("gen_left", False), ("gen_eos", True)])
def test_greedy_tokens_and_scores_equal_transformers(gemma_2_model, gemma_2_case, name, eos):
    """Decoding caps the logits and windows the cache as training does: 22 real tokens are far beyond a window of 6."""
    case = gemma_2_case.stored
    expected = case[f"{name}_tokens"]
    ids = case[f"{name.removesuffix('_eos')}_input_ids"]
    mask = case["gen_left_attention_mask"] if name == "gen_left" else np.ones_like(ids)
    text = ids != 150  # image placeholders
    tokens, out = generate(
        gemma_2_model,
        case["gen_pixel_values"].transpose(0, 2, 3, 1),
        ids[text].reshape(2, -1),
        mask[text].reshape(2, -1),
        expected.shape[1],
        int(case["gen_eos_id"]) if eos else -1,
        return_out=True,
    )
    np.testing.assert_array_equal(tokens, expected)
    if not eos:
        np.testing.assert_allclose(out["logits"], case[f"{name}_scores"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("change", [dict(sliding_window=None), dict(sliding_window=7), dict(final_softcap=None)])
def test_the_golden_depends_on_the_window_and_the_cap(gemma_2_model, gemma_2_case, change):
    """Checks the tests above: without the window or the cap the logits differ."""
    config = gemma_2_model.config.replace(decoder=change)
    other = nnx.clone(gemma_2_model)
    for module in (other, other.decoder):
        module.config = config if module is other else config.decoder
    logits = np.asarray(other(**gemma_2_case.inputs)[0])
    expected, real = gemma_2_case.stored["logits"][:, gemma_2_case.patches :], gemma_2_case.real
    assert np.abs(logits[real] - expected[real]).max() > 1e-2


# The mask.


def windowed(mask_ar, valid, window):
    mask = prefix_mask(valid, mask_ar)
    positions = positions_of(valid)
    return np.asarray(sliding_mask(mask, positions, positions, window))


def rows(text):
    return np.array([[int(c) for c in line.split()] for line in text.strip().splitlines()], bool)


def test_the_window_leaves_the_prefix_whole_and_cuts_the_suffix():
    mask = windowed(jnp.array([[0, 0, 0, 1, 1]]), jnp.ones((1, 5), bool), 2)
    np.testing.assert_array_equal(
        mask[0],
        rows("""
             1 1 1 0 0
             1 1 1 0 0
             1 1 1 0 0
             0 0 1 1 0
             0 0 0 1 1"""),
    )


def test_a_causal_text_keeps_a_band():
    mask = windowed(jnp.ones((1, 6), jnp.int32), jnp.ones((1, 6), bool), 3)
    np.testing.assert_array_equal(mask[0], np.tril(np.ones((6, 6), bool)) & ~np.tril(np.ones((6, 6), bool), -3))


def test_padding_does_not_count():
    """[0 0 0 1 1] with a pad after the second token: the real tokens attend to each other as without it."""
    mask_ar, valid = jnp.array([[0, 0, 0, 0, 1, 1]]), jnp.array([[1, 1, 0, 1, 1, 1]], bool)
    mask = windowed(mask_ar, valid, 2)[0]
    real = np.asarray(valid[0])
    expected = windowed(jnp.array([[0, 0, 0, 1, 1]]), jnp.ones((1, 5), bool), 2)[0]
    np.testing.assert_array_equal(mask[real][:, real], expected)
    assert not mask[:, ~real].any()


def test_queries_may_start_anywhere_among_the_keys():
    """Decoding one slot at a time gives the rows of the whole mask."""
    mask_ar, valid = jnp.array([[0, 0, 0, 1, 1, 1]]), jnp.ones((1, 6), bool)
    mask, positions = prefix_mask(valid, mask_ar), positions_of(valid)
    whole = sliding_mask(mask, positions, positions, 2)
    for start in range(3, 6):
        part = sliding_mask(mask[:, start : start + 1], positions[:, start : start + 1], positions, 2, start)
        np.testing.assert_array_equal(part, whole[:, start : start + 1])


# The decoder alone.


@pytest.fixture(scope="module")
def decoder(make_random):
    config = GemmaConfig(
        vocab_size=32, width=16, depth=3, mlp_dim=24, num_heads=2, head_dim=8, sliding_window=4, attn_softcap=5.0
    )
    return make_random(nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0))))


def test_cached_decoding_equals_the_full_forward(decoder):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 11, 16)), jnp.float32)
    prefix = 6
    valid = jnp.ones((2, 11), bool).at[1, 4:6].set(False)  # row 1 has two pads behind its prompt
    mask_ar = (jnp.arange(11) >= prefix)[None].repeat(2, 0).astype(jnp.int32)
    positions, mask = positions_of(valid), prefix_mask(valid, mask_ar)
    graph, arrays = param_tree.split(decoder)
    run = jax.jit(lambda arrays, *inputs: param_tree.merge(graph, arrays)(*inputs)[:2])
    full, _ = run(arrays, x, positions, mask)

    cache = decoder.empty_cache(2, 11)
    assert cache["positions"].shape == (1, 2, 11)
    hidden, cache = run(arrays, x[:, :prefix], positions[:, :prefix], mask[:, :prefix], cache, 0)
    np.testing.assert_allclose(hidden[0], full[0, :prefix], atol=1e-5)
    for i in range(prefix, 11):
        now = slice(i, i + 1)
        hidden, cache = run(arrays, x[:, now], positions[:, now], mask[:, now], cache, i)
        np.testing.assert_allclose(hidden[:, 0], full[:, i], atol=1e-5)


def test_a_window_longer_than_the_cache_is_free(decoder):
    assert set(decoder.empty_cache(2, 4)) == {"k", "v"}
    assert set(decoder.empty_cache(2, 5)) == {"k", "v", "positions"}


def test_receptive_field_of_windowed_layers(decoder):
    """Layers 0 and 2 are windowed, layer 1 is not: with layer 1 windowed too, reach would be 3 * 3 = 9 positions."""
    length = 14
    graph, arrays = param_tree.split(decoder)
    positions = jnp.arange(length)[None]
    mask = prefix_mask(jnp.ones((1, length), bool), jnp.ones((1, length), jnp.int32))
    run = jax.jit(lambda x: param_tree.merge(graph, arrays)(x, positions, mask)[0])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, length, 16)), jnp.float32)
    change = np.abs(run(x.at[0, 0].add(1.0)) - run(x)).max(-1)[0]
    assert (change > 1e-6).all()  # through layer 1, which reads everything

    one_layer = functools.partial(jax.tree.map, lambda leaf: leaf[:1])
    config = GemmaConfig(
        vocab_size=32, width=16, depth=1, mlp_dim=24, num_heads=2, head_dim=8, sliding_window=4, attn_softcap=5.0
    )
    single = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
    kept = {path: one_layer(leaf) if path.startswith("layers/") else leaf for path, leaf in arrays.items()}
    single = param_tree.assign(single, kept)
    change = np.abs(single(x.at[0, 0].add(1.0), positions, mask)[0] - single(x, positions, mask)[0]).max(-1)[0]
    assert (change[:4] > 1e-6).all() and (change[4:] == 0.0).all()


# Beams share the slots of a cache and candidates share a row, so the window must count positions, not slots.


def test_beams_and_candidates_are_scored_as_by_a_full_forward(gemma_2_model, gemma_2_case):
    model, case, new = gemma_2_model, gemma_2_case.stored, 5
    prompt = case["gen_input_ids"][:, gemma_2_case.patches :].astype(np.int32)
    images = jnp.asarray(case["gen_pixel_values"].transpose(0, 2, 3, 1))
    tokens, out = generate(
        model, images, prompt, None, new, -1, "beam", num_beams=3, length_penalty=0.0, return_out=True
    )
    text = jnp.concatenate([prompt, tokens], axis=1)
    mask_ar = (jnp.arange(text.shape[1]) >= prompt.shape[1])[None].repeat(2, 0).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(model(images, text, mask_ar)[0][:, prompt.shape[1] - 1 : -1])
    expected = jnp.take_along_axis(log_probs, tokens[..., None], axis=2).sum((1, 2))
    np.testing.assert_allclose(out["score"], expected, atol=1e-3)

    features, _ = model.encode_image(images)
    scores = score_candidates(model, features, prompt, np.ones_like(prompt), tokens, np.ones_like(tokens))
    np.testing.assert_allclose(jnp.diagonal(scores), expected, atol=1e-3)
