"""Tokens of texts for SigLIP and CLIP, against transformers' tokenizers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from train_jax.core.errors import UserError

GOLDEN = Path(__file__).parents[3] / "golden/text_tokenizers"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name, file", [("siglip", ""), ("clip", ""), ("siglip2", "tokenizer.model"), ("siglip2", "tokenizer.json")]
)
def test_tokens_equal_transformers(name, file):
    case = CASES[name]
    tokens, mask = load_text_tokenizer(GOLDEN / name / file, case["length"])(CASES["texts"])
    np.testing.assert_array_equal(tokens, case["input_ids"])
    assert tokens.dtype == np.int32
    # SigLIP reads its padding; so do the released SigLIP 2 models, whose processor hands out no mask.
    np.testing.assert_array_equal(mask, case["attention_mask"] if name == "clip" else np.ones_like(tokens, bool))


@pytest.mark.parametrize("name", ["siglip", "clip", "siglip2"])
def test_a_cut_text_keeps_its_end_mark(name):
    tokenizer = load_text_tokenizer(GOLDEN / name, 5)
    tokens, _ = tokenizer(["the " * 30])
    assert tokens.shape == (1, 5) and tokens[0, -1] == tokenizer.eos_id
    assert (tokens[0, :-1] != tokenizer.eos_id).all()


def test_default_lengths_are_those_of_the_released_models():
    assert load_text_tokenizer(GOLDEN / "siglip").length == 64
    assert load_text_tokenizer(GOLDEN / "clip").length == 77
    assert load_text_tokenizer(GOLDEN / "siglip", 16).length == 16


def test_siglip_keeps_punctuation_on_request_and_never_case():
    plain, kept = (load_text_tokenizer(GOLDEN / "siglip", keep_punctuation=keep) for keep in (None, True))
    assert plain.encode("A Red, cube!") == plain.encode("a red cube") != kept.encode("a red, cube!")
    assert kept.encode("A Red") == kept.encode("a red")


def test_the_tiny_models_vocabulary():
    """Every word of CLEVR is one piece, also at the start of a sentence."""
    tokens, mask = load_text_tokenizer("tiny", 8)(["The red cube", ""])
    assert mask.all() and np.count_nonzero(tokens[0]) == 4  # three words, EOS
    np.testing.assert_array_equal(tokens[1], [1, 0, 0, 0, 0, 0, 0, 0])


def test_a_file_beside_an_npz_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "siglip/spiece.model").read_bytes())
    (tmp_path / "x.npz").touch()
    assert load_text_tokenizer(tmp_path / "x.npz").pad_id == 1


def test_errors(tmp_path):
    def refused(sentence, *arguments):
        with pytest.raises(UserError, match=sentence):
            load_text_tokenizer(*arguments)

    refused("holds no spiece.model", tmp_path)
    refused("expected 2 tokens or more", GOLDEN / "siglip", 1)
    (tmp_path / "spiece.model").write_bytes(b"no model")
    refused("no SentencePiece model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("cannot be read as a tokenizer", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="the text tower's vocabulary has 60 entries but .* needs 67"):
        load_text_tokenizer(GOLDEN / "siglip").fits(60)


def beside(tmp_path, name, **files):
    """A copy of a golden folder with further JSON files beside the tokenizer's own."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_added_tokens_are_read_and_need_a_row(tmp_path):
    """As in transformers: one id, even within a word, and the embedding needs a row for it."""
    folder = beside(tmp_path, "siglip2", added_tokens={"<Answer>": 400})
    words, plain = (load_text_tokenizer(place) for place in (folder, GOLDEN / "siglip2"))
    assert words.encode("a<Answer>red") == [*plain.encode("a"), 400, *plain.encode("red")]
    words.fits(401)
    with pytest.raises(UserError, match="400 entries but .* needs 401"):
        words.fits(400)
    folder = beside(tmp_path, "siglip", added_tokens={"<answer>": 67})
    with pytest.raises(UserError, match=r"add '<answer>' = 67, expected no more than its 67 pieces"):
        load_text_tokenizer(folder)


@pytest.mark.parametrize(
    "name, values, sentence",
    [
        ("siglip", {"eos_token": "<unk>"}, "eos_token = '<unk>', expected the token 1"),
        ("clip", {"bos_token": "<|endoftext|>"}, r"bos_token = '<\|endoftext\|>', expected the token"),
        ("siglip", {"pad_token": "[PAD]"}, r"pad_token = '\[PAD\]', expected a token that a piece or an added"),
        ("siglip2", {"pad_token": "[PAD]"}, r"pad_token = '\[PAD\]', expected a token that a piece or an added"),
        ("clip", {"pad_token": "[PAD]"}, r"pad_token = '\[PAD\]', expected a token that a piece or an added"),
        ("siglip2", {"padding_side": "left"}, "padding_side = 'left', expected 'right'"),
        ("clip", {"truncation_side": "left"}, "truncation_side = 'left', expected 'right'"),
        ("clip", {"pad_token": "<new>"}, "pad_token = '<new>', expected a token that a piece or an added token has"),
        ("siglip2", {"pad_token": "!!"}, "pad_token = '!!', expected a token that a piece or an added token has"),
        ("siglip", {"do_lower_case": "false"}, "do_lower_case = 'false', expected true or false"),
        ("siglip", {"extra_special_tokens": ["x"]}, "add 'x' = 52, expected no more than its 67 pieces"),
        ("siglip2", {"split_special_tokens": True}, "split_special_tokens = True, expected False"),
        ("siglip", {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs = .*, expected no unknown key"),
    ],
)
def test_config_values_are_read_or_refused(tmp_path, name, values, sentence):
    with pytest.raises(UserError, match=sentence):
        load_text_tokenizer(beside(tmp_path, name, tokenizer_config=values))


def test_a_config_sets_length_and_lower_case(tmp_path):
    words = load_text_tokenizer(beside(tmp_path, "siglip", tokenizer_config={"model_max_length": 9}))
    assert words.length == 9 and words.encode("A Red") == words.encode("a red")
    folder = beside(tmp_path / "other", "siglip", tokenizer_config={"do_lower_case": False})
    assert load_text_tokenizer(folder).encode("A Red") != words.encode("a red")


@pytest.mark.parametrize("name", ["siglip", "clip", "siglip2"])
@pytest.mark.parametrize("texts", ["a red cube", ["a", None], [b"a"], ["\ud83d"]])
def test_anything_but_a_list_of_texts_is_refused(name, texts):
    with pytest.raises(UserError, match="expected (a list|text)"):
        load_text_tokenizer(GOLDEN / name)(texts)
