"""Generation against both goldens and against uncached forwards; invariance to padding, batch mates and seeds."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.inputs import check_integers
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

STEPS = 12


@pytest.fixture(scope="module")
def big_vision(big_vision_model, big_vision_case):
    """Model, arrays, and the greedy run that several tests use."""
    model, case = big_vision_model, big_vision_case
    return model, case, *run(model, case, case["dec_text"], case["dec_mask_input"])


def run(model, case, tokens, mask, eos_id=-1, **options):
    return generate(model, case["image"], tokens, mask, STEPS, eos_id, return_out=True, **options)


def left_padded(tokens, mask, pad=0):
    """The same prompts with padding on the left."""
    rows = [
        np.concatenate([np.full((~real).sum(), pad), row[real]]) for row, real in zip(tokens, mask > 0, strict=True)
    ]
    return np.stack(rows), np.sort(mask, axis=1)


def test_big_vision_greedy(big_vision):
    _, case, tokens, out = big_vision
    np.testing.assert_array_equal(tokens, case["dec_tokens"])
    np.testing.assert_allclose(out["logits"], case["dec_logits"], atol=4e-5)
    assert tokens.dtype == jnp.int32
    assert out["steps"] == STEPS


def test_big_vision_greedy_with_a_bfloat16_cache(big_vision):
    model, case, *_ = big_vision
    tokens, out = run(model, case, case["dec_text"], case["dec_mask_input"], cache_dtype="bfloat16")
    np.testing.assert_array_equal(tokens, case["dec_tokens_bf16cache"])
    np.testing.assert_allclose(out["logits"], case["dec_logits_bf16cache"], atol=2e-3)
    assert np.abs(out["logits"] - case["dec_logits"]).max() > 1e-2  # the cache is bfloat16 indeed


def test_hugging_face_greedy_left_padding_and_eos(hugging_face_model, hugging_face_case):
    model, case = hugging_face_model, hugging_face_case.stored
    images = case["gen_pixel_values"].transpose(0, 2, 3, 1)
    left, no_pads = case["gen_left_attention_mask"], np.ones((2, 24), int)
    for name, mask, eos_id in (("gen", no_pads, -1), ("gen_left", left, -1), ("gen_eos", no_pads, case["gen_eos_id"])):
        ids = case[f"{name.replace('_eos', '')}_input_ids"]
        text = ids != 150  # image placeholders
        tokens, mask = ids[text].reshape(2, -1), mask[text].reshape(2, -1)
        tokens, out = generate(model, images, tokens, mask, STEPS, int(eos_id), return_out=True)
        np.testing.assert_array_equal(tokens, case[f"{name}_tokens"])
        if eos_id == -1:
            np.testing.assert_allclose(out["logits"], case[f"{name}_scores"], atol=2e-4)


@jax.jit
def full_forward(model, *batch):
    return model(*batch)[0]


def uncached_logits(model, case, tokens):
    """[3, STEPS, V] that each continuation token is picked from, by one forward over prompts and continuations."""
    counts = case["dec_mask_input"].sum(axis=1)
    length = case["dec_text"].shape[1] + STEPS
    text, mask_ar = np.zeros((3, length), np.int32), np.ones((3, length), np.int32)
    for row, count in enumerate(counts):
        text[row, :count], text[row, count : count + STEPS] = case["dec_text"][row, :count], tokens[row]
        mask_ar[row, :count] = 0
    mask_input = np.arange(length) < counts[:, None] + STEPS
    logits = full_forward(model, *map(jnp.asarray, (case["image"], text, mask_ar, mask_input)))
    return np.stack([row[count - 1 : count - 1 + STEPS] for row, count in zip(logits, counts, strict=True)])


def sum_of_log_probs(logits, tokens):
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[..., None], axis=-1).sum(
        (1, 2)
    )


def test_cached_decoding_equals_a_full_forward_of_prompt_and_continuation(big_vision):
    model, case, tokens, out = big_vision
    np.testing.assert_allclose(out["logits"], uncached_logits(model, case, tokens), atol=4e-5)


def test_padding_side_and_ids_of_padding_change_nothing(big_vision):
    model, case, tokens, out = big_vision
    text, mask = left_padded(case["dec_text"], case["dec_mask_input"], pad=10**6)
    again, out_again = run(model, case, text, mask)
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_allclose(out_again["logits"], out["logits"], atol=2e-5)


def test_rows_do_not_depend_on_their_batch_mates(big_vision):
    model, case, tokens, _ = big_vision
    order = np.array([2, 1, 1])
    text, mask = case["dec_text"][order], case["dec_mask_input"][order]
    others = generate(model, case["image"][order], text, mask, STEPS, -1, return_out=True)[0]
    np.testing.assert_array_equal(others, tokens[order])


def test_draws_are_seeded_by_row_and_do_not_depend_on_batch_mates_or_padding(big_vision):
    model, case, *_ = big_vision
    prompts, padded = (case["dec_text"], case["dec_mask_input"]), left_padded(case["dec_text"], case["dec_mask_input"])
    options = dict(sampler="nucleus", top_p=0.95)
    first, again, other = (run(model, case, *prompts, seed=seed, **options)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()
    np.testing.assert_array_equal(run(model, case, *padded, seed=5, **options)[0], first)

    same = [np.repeat(array[:1], 3, axis=0) for array in (case["image"], *prompts)]
    copies = generate(model, *same, STEPS, -1, seed=5, return_out=True, **options)[0]
    np.testing.assert_array_equal(copies[0], first[0])  # other batch mates, same index
    assert (copies[0] != copies[1]).any()  # the same prompt at another index
    cold = run(model, case, *prompts, sampler="nucleus", top_p=0.95, temperature=0.0)[0]
    np.testing.assert_array_equal(cold, case["dec_tokens"])


def test_a_single_row_samples_as_in_a_batch_and_features_replace_images(big_vision):
    model, case, *_ = big_vision
    features = jax.jit(lambda model, images: model.encode_image(images)[0])(model, jnp.asarray(case["image"]))
    options = dict(max_new_tokens=3, eos_id=-1, sampler="temperature", seed=3, temperature=2.0)
    batch = generate(model, case["image"], case["dec_text"], case["dec_mask_input"], **options)
    alone = generate(model, None, case["dec_text"][:1, :6], image_features=features[:1], **options)  # without padding
    np.testing.assert_array_equal(alone[0], batch[0])


def test_generation_stops_when_all_rows_have_ended(big_vision):
    model, case, tokens, _ = big_vision
    order, eos_id = np.array([1, 2, 2]), 96  # rows that have the word at steps 5, 3, 3
    case = {name: case[name][order] for name in ("image", "dec_text", "dec_mask_input")}
    stopped, out = run(model, case, case["dec_text"], case["dec_mask_input"], eos_id)
    want = np.asarray(tokens)[order]
    want[0, 6:], want[1:, 4:] = 0, 0
    np.testing.assert_array_equal(stopped, want)
    assert out["steps"] == 6
    assert not np.any(out["logits"][:, 6:])
    assert np.all(np.any(out["logits"][:, :6], axis=-1))


def test_one_compile_serves_all_prompts_seeds_temperatures_and_eos(big_vision, monkeypatch):
    model, case, *_ = big_vision
    file, traced = importlib.import_module("paligemma_jax.generation.generate"), []
    prefill = file._prefill
    monkeypatch.setattr(file, "_prefill", lambda *arguments: traced.append(0) or prefill(*arguments))
    for seed, temperature, eos_id in ((0, 1.0, 1), (1, 0.5, -1), (2, 0.0, 7)):
        text = np.roll(case["dec_text"], seed, axis=0)
        generate(model, case["image"], text, None, 3, eos_id, "temperature", seed, temperature=temperature)
    assert len(traced) <= 1  # 0 if a test before this one used these shapes


def test_beams_find_likelier_continuations_than_greedy_and_score_them_right(big_vision):
    model, case, tokens, out = big_vision
    prompts, options = (case["dec_text"], case["dec_mask_input"]), dict(sampler="beam", num_beams=3, length_penalty=0.0)
    best, beams = run(model, case, *prompts, **options)
    np.testing.assert_allclose(beams["score"], sum_of_log_probs(uncached_logits(model, case, best), best), atol=2e-4)
    gain = beams["score"] - sum_of_log_probs(out["logits"], tokens)
    assert np.all(gain > -2e-4)
    assert np.any(gain > 1e-2)
    padded, _ = run(model, case, *left_padded(*prompts), **options)
    np.testing.assert_array_equal(padded, best)


def test_row_numbers_may_go_on_from_an_earlier_batch(big_vision):
    model, case, *_ = big_vision
    arrays = case["image"], case["dec_text"], case["dec_mask_input"]
    options = dict(max_new_tokens=4, eos_id=-1, sampler="temperature", temperature=2.0)
    whole = generate(model, *arrays, **options)
    rest = generate(model, *(array[1:] for array in arrays), first_row=1, **options)
    np.testing.assert_array_equal(rest, whole[1:])
    assert not np.array_equal(generate(model, *arrays, first_row=7, **options), whole)


BAD = [
    (dict(first_row=-1), "first_row is -1, expected 0 or more"),
    (dict(sampler="best"), "sampler is 'best', expected one of greedy"),
    (dict(top_k=4), "'greedy' takes draft_tokens, not top_k"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(eos_id=192), "eos_id is 192"),
    (dict(cache_dtype="int8"), "cache_dtype is 'int8'"),
    (dict(tokens=np.ones(4, int)), r"tokens are int32\[4\]"),
    (dict(tokens=np.ones((3, 10))), r"tokens are float32\[3, 10\]"),
    (dict(tokens=np.full((3, 10), 192)), "tokens hold the id 192, expected ids from 0 to 191"),
    (dict(mask_input=np.ones((3, 9))), r"mask_input has shape \[3, 9\] but tokens have \[3, 10\]"),
    (dict(mask_input=np.arange(30).reshape(3, 10) < 20), "row 2 of mask_input marks no real token"),
    (dict(images=None), "neither of images and image_features"),
    (dict(image_features=np.zeros((3, 16, 64))), "both of images and image_features"),
    (dict(images=np.zeros((3, 28, 28, 3), np.uint8)), r"images are uint8\[3, 28, 28, 3\]"),
    (dict(images=np.zeros((3, 56, 56, 3))), r"expected floating point \[3, 28, 28, 3\]"),
    (dict(images=None, image_features=np.zeros((2, 16, 64))), r"image_features are float32\[2, 16, 64\]"),
]


@pytest.mark.parametrize(("wrong", "sentence"), BAD)
def test_user_errors(big_vision, wrong, sentence):
    model, case, *_ = big_vision
    good = dict(images=case["image"], tokens=case["dec_text"], mask_input=case["dec_mask_input"])
    with pytest.raises(UserError, match=sentence):
        generate(model, **good | wrong)


@pytest.mark.parametrize("value", [2.5, "5", None, [3]])
def test_values_that_are_not_integers_are_refused_by_name(value):
    with pytest.raises(UserError, match="max_new_tokens is .*, expected a whole number"):
        check_integers(max_new_tokens=value)
    check_integers(max_new_tokens=np.int64(3), seed=jnp.int32(3))
