"""Prompts: the aligned rows of the module's docstring, budgets, training arrays, the printed batch."""

import numpy as np
import pytest

from paligemma_jax.data import prompts
from paligemma_jax.data.prompts import TruncationError, format_batch, make_example, padded_length, training_arrays
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from train_jax.core.errors import UserError

TINY = load_tokenizer("tiny")
#         <bos> how many cubes \n two red <eos> <pad> <pad> <pad>   as in the module's docstring
MASK_AR = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
MASK_INPUT = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
MASK_LOSS = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
PIECES = ["<bos>", "how", "▁many", "▁cubes", "\n", "two", "▁red", "<eos>", "<pad>", "<pad>", "<pad>"]


def pieces(ids):
    return [TINY.piece(i) for i in ids]


def docstring_row(name):
    (line,) = [line for line in prompts.__doc__.splitlines() if line.split()[:1] == [name]]
    return [int(bit) for bit in line.split("1:")[0].split()[1:]]


def test_training_example_equals_the_rows_in_the_docstring():
    example = make_example(TINY, "how many cubes", "two red", length=10)
    assert pieces(example["tokens"]) == PIECES
    for name, row in (("mask_ar", MASK_AR), ("mask_input", MASK_INPUT), ("mask_loss", MASK_LOSS)):
        assert example[name].tolist() == row == docstring_row(name)
    assert {key: value.dtype for key, value in example.items()} == {
        "tokens": np.int32,
        "mask_ar": np.int32,
        "mask_input": np.bool_,
        "mask_loss": np.bool_,
    }


def test_training_arrays_have_the_next_token_as_target():
    example = make_example(TINY, "how many cubes", "two red", length=10)
    batch = training_arrays({key: np.stack([value, value]) for key, value in example.items()})
    assert all(value.shape == (2, 10) for value in batch.values())
    assert pieces(batch["tokens"][1]) == PIECES[:-1]
    assert pieces(batch["targets"][1]) == PIECES[1:]
    assert batch["weights"][1].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0] == docstring_row("weights")
    assert batch["weights"].dtype == np.float32
    assert batch["mask_ar"][1].tolist() == MASK_AR[:-1] and batch["mask_input"][1].tolist() == MASK_INPUT[:-1]


def test_a_prompt_is_the_start_of_its_training_example():
    prompt = make_example(TINY, "how many cubes", None, length=8)
    assert pieces(prompt["tokens"]) == [*PIECES[:5], "<pad>", "<pad>", "<pad>"]
    assert prompt["mask_ar"].tolist() == MASK_AR[:8]
    assert prompt["mask_input"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert not prompt["mask_loss"].any()


def test_prompt_equals_transformers():
    """`bos + prompt + "\\n"`, then suffix + eos."""
    tokens = make_example(TINY, "detect cube", "<loc0001><loc0002> cube", length=30)["tokens"].tolist()
    prompt = [2, *TINY.encode("detect cube"), *TINY.encode("\n")]
    answer = [TINY.loc(1), TINY.loc(2), *TINY.encode(" cube"), 1]
    assert tokens == prompt + answer + [0] * (31 - len(prompt + answer))


def test_lengths_at_the_limits_and_beyond():
    """5 tokens of prefix, 3 of suffix: 8 entries, of which the model reads 7."""
    example = make_example(TINY, "how many cubes", "two red", 7, prefix_length=5, suffix_length=3)
    assert pieces(example["tokens"]) == PIECES[:8]
    assert len(make_example(TINY, "how many cubes", None, 5)["tokens"]) == 5
    for length, limits, words in (
        (6, {}, "8 tokens but 7 fit"),
        (20, {"prefix_length": 4}, "5 tokens but 4 fit"),
        (20, {"suffix_length": 2}, "suffix with EOS has 3 tokens but 2 fit"),
    ):
        with pytest.raises(TruncationError, match=words):
            make_example(TINY, "how many cubes", "two red", length, **limits)
    with pytest.raises(TruncationError, match="5 tokens but 4 fit"):
        make_example(TINY, "how many cubes", None, 4)


def test_prompts_are_padded_to_few_lengths_and_little():
    lengths = range(1, 513)
    padded = [padded_length(length) for length in lengths]
    assert sorted(set(padded)) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(0 <= more - length < max(16, length / 2) for length, more in zip(lengths, padded, strict=True))


@pytest.mark.parametrize("mark", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_special_tokens_are_refused_in_every_text(mark):
    for prefix, suffix in ((f"{mark}answer en", "yes"), ("answer en", f"a {mark}"), (f"a{mark}b", None)):
        with pytest.raises(UserError, match=f"holds {mark}, which the format adds by itself; remove it"):
            make_example(TINY, prefix, suffix, 30)


def test_special_tokens_parse_reads_them_as_transformers():
    """`<image>` in front is dropped; `<bos>`, `<eos>`, `<pad>` and `<unk>` are ids 2, 1, 0 and 3."""
    options = dict(length=20, special_tokens="parse")
    plain, marked = (make_example(TINY, text, "red", **options)["tokens"] for text in ("how", "<image>how"))
    np.testing.assert_array_equal(plain, marked)
    ids = make_example(TINY, "how<bos> many<pad>", "two<eos><unk>", **options)["tokens"]
    how, many, two = (TINY.encode(text) for text in ("how", " many", "two"))
    expected = [2, *how, 2, *many, 0, 4, *two, 1, 3, 1]
    assert ids[: len(expected)].tolist() == expected
    for prefix, suffix in (("how <image>", None), ("how", "<image>"), ("<image><image>", None)):
        with pytest.raises(UserError, match="holds <image>.*leave it out"):
            make_example(TINY, prefix, suffix, **options)
    with pytest.raises(UserError, match="special_tokens is 'read', expected one of refuse, parse"):
        make_example(TINY, "how", None, 9, special_tokens="read")


def test_a_long_text_is_not_repeated_in_a_message():
    with pytest.raises(UserError) as info:
        make_example(TINY, "word " * 2000 + "<eos>", None, 9)
    assert len(str(info.value)) < 500


def test_printed_batch():
    example = make_example(TINY, "how many cubes", "two red", length=10)
    text = format_batch(TINY, {key: value[None] for key, value in example.items()})
    assert text == "\n".join(
        [
            "example 0",
            "tokens      <bos> how ▁many ▁cubes \\n two ▁red <eos> <pad>",
            "mask_ar         0   0     0      0  0   1    1     1     1",
            "mask_input      1   1     1      1  1   1    1     1     0",
            "mask_loss       0   0     0      0  0   1    1     1     0",
            "(2 more <pad>)",
        ]
    )


def test_printed_batch_wraps_and_keeps_columns_together():
    example = make_example(TINY, "how many cubes " * 20, "two", length=70)
    batch = training_arrays({key: value[None] for key, value in example.items()})
    lines = format_batch(TINY, batch).splitlines()
    assert max(map(len, lines)) <= 120
    words = [word for line in lines if line.startswith("tokens ") for word in line.split()[1:]]
    bits = [word for line in lines if line.startswith("weights ") for word in line.split()[1:]]
    assert len(words) == len(bits) and words[-3:] == ["two", "<eos>", "<pad>"] and bits[-4:] == ["1", "1", "0", "0"]


def test_a_text_that_is_too_long_is_not_repeated_whole():
    with pytest.raises(TruncationError) as error:
        make_example(TINY, "word " * 1600, "yes", 64)
    assert len(str(error.value)) < 250 and "(8,000 characters)" in str(error.value)


@pytest.mark.parametrize("texts", [("\ud83d", "x"), ("q", "cut \ud83d")])
def test_half_surrogate_pairs_are_refused(texts):
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        make_example(TINY, *texts, 16)
