"""Added tokens and folders with only a tokenizer.json, compared with transformers; and invalid files."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

import paligemma_jax as pg
from paligemma_jax.data.tokenizers.added_tokens import AddedToken, Splitter
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.files.shipped import SHIPPED
from train_jax.core.errors import UserError

GOLDEN = Path(__file__).parents[3] / "golden/text_tokenizers"
GEMMA = GOLDEN / "gemma"
CASES = json.loads((GEMMA / "cases.json").read_text(encoding="utf-8"))["texts"]
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
ANSWER = {
    "added_tokens": {"<answer>": 1792},
    "tokenizer_config": {"added_tokens_decoder": {"1792": {"content": "<answer>"} | FLAGS}},
    "tokenizer": [{"id": 1792, "content": "<answer>"} | FLAGS],
}


def decoded(content, index=1792, **flags):
    """Returns the entry of one added token in tokenizer_config.json."""
    return {"added_tokens_decoder": {str(index): {"content": content} | FLAGS | flags}}


@pytest.fixture
def folder(tmp_path):
    """Writes the tiny model's tokenizer with JSON files beside it; `tokenizer` are further added tokens of that."""

    def write(model=True, **files):
        if model:
            shutil.copy(SHIPPED["tiny"] / "tokenizer.model", tmp_path)
        if "tokenizer" in files or not model:
            values = json.loads((SHIPPED["tiny"] / "tokenizer.json").read_text(encoding="utf-8"))
            values["added_tokens"] += files.pop("tokenizer", [])
            files["tokenizer"] = values
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("case", CASES, ids=[repr(case["text"]) for case in CASES])
def test_a_tokenizer_json_alone_gives_the_ids_of_transformers(case):
    """With tokens that include white space, match whole words only, or are matched after normalisation."""
    words = load_tokenizer(GEMMA)
    assert words.encode(case["text"], marks=True) == case["ids"]


def test_paligemmas_tokens_follow_others_as_in_its_processor():
    words = load_tokenizer(GEMMA)  # transformers: image 336, <loc0000> 337, <seg127> 1488
    assert (words.image_id, words.loc(0), words.seg(127), words.vocab_size) == (336, 337, 1488, 1489)


def test_the_tiny_models_two_files_agree(folder):
    tiny, words = load_tokenizer("tiny"), load_tokenizer(folder(model=False))
    assert (words.image_id, words.loc(3), words.vocab_size) == (tiny.image_id, tiny.loc(3), tiny.vocab_size)
    for text in ("how many red cubes\n<loc0001>", "a<bos>b", "x  y é漢", "\n\n", "<unk>", "<eos", ""):
        assert words.encode(text) == tiny.encode(text) and words.decode(words.encode(text)) == text
    copy = pickle.loads(pickle.dumps(words))  # grain sends it to its workers
    assert copy.encode("red<loc0002>") == tiny.encode("red<loc0002>")


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("name", ANSWER)
def test_each_of_the_three_files_adds_tokens(folder, name, model, tmp_path_factory):
    words = load_tokenizer(folder(model, **{name: ANSWER[name]}))
    red = words.encode("red")
    assert words.encode("red<answer>red") == [*red, 1792, *red]
    assert words.decode([*red, 1792]) == "red<answer>" and words.piece(1792) == "<answer>"
    assert words.vocab_size == 1793 and words.image_id == 1718
    words.fits(1793)
    with pytest.raises(UserError, match="1,792 entries but the tokenizer needs 1,793"):
        words.fits(1792)
    run = tmp_path_factory.mktemp("run")
    words.save(run)  # as a run saves it in its workdir
    assert load_tokenizer(run).encode("red<answer>\n") == words.encode("red<answer>\n")


def test_ids_of_locations_in_a_file_are_used(folder):
    """As transformers' processor writes them if it adds them itself: the image first."""
    words = load_tokenizer(folder(added_tokens={"<image>": 566} | {f"<loc{i:04d}>": 567 + i for i in range(1024)}))
    assert (words.image_id, words.loc(0)) == (566, 567)


@pytest.mark.parametrize(
    "files, sentence",
    [
        ({"added_tokens": {"<a>": 1792, "<b>": 1792}}, "'<b>' = 1792, but .* says '<a>' for that id"),
        ({"added_tokens": {"<a>": 1792}, "tokenizer": [{"id": 1793, "content": "<a>"}]}, "1793 for that token"),
        ({"added_tokens": {"<a>": "7"}}, "the added token '7' = .*, expected a text with an id"),
        ({"added_tokens": {"": 1792}}, "expected a text with an id"),
        ({"added_tokens": {"cut \ud83d": 1792}}, "expected a text with an id"),
        ({"tokenizer_config": {"eos_token": "\ud83d"}}, r"eos_token = '\\ud83d', expected texts"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, r"added_tokens_decoder = \[\], expected an object"),
        ({"tokenizer_config": {"added_tokens_decoder": False}}, "added_tokens_decoder = False, expected an object"),
        ({"added_tokens": {"answer": 1792}}, "adds 'answer' = 1792, but that is a piece already, 328"),
        ({"tokenizer_config": decoded("answer", single_word=True)}, "that is a piece already, 328"),
        ({"tokenizer": [{"id": 1792, "content": "answer"} | FLAGS]}, "that is a piece already, 328"),
        ({"tokenizer_config": decoded("<a>", lstrip="false")}, "added token 1792 lstrip = 'false', expected true"),
        ({"tokenizer_config": decoded("<a>", special=1)}, "added token 1792 special = 1, expected true or false"),
        ({"tokenizer_config": {"eos_token": "red"}}, "eos_token = 'red', expected <eos>"),
        ({"tokenizer_config": {"additional_special_tokens": ["<new>"]}}, "'<new>', expected a token that a piece"),
        ({"special_tokens_map": {"bos_token": {"content": "<s>"}}}, "special_tokens_map.json has bos_token = '<s>'"),
        ({"tokenizer_config": {"do_lower_case": True}}, "do_lower_case = True, expected false"),
        ({"tokenizer_config": {"clean_up_tokenization_spaces": True}}, "clean_up_tokenization_spaces = True"),
        ({"tokenizer_config": {"novel": 3}}, "tokenizer_config.json has novel = 3, expected no unknown key"),
    ],
)
def test_contradicting_files_are_refused(folder, files, sentence):
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(folder(**files))


@pytest.mark.parametrize("model", [True, False])
def test_texts_are_split_at_a_piece_added_with_its_own_id(folder, model):
    """The ids are those of transformers 5.24."""
    words = load_tokenizer(folder(model, tokenizer_config=decoded("answer", 328)))
    assert words.encode("an answer") == [322, 261, 328]


LISTED = {  # what is listed, and transformers' ids of "cube red-red reared" and "A reddish red cube a"
    "tiny": ({"additional_special_tokens": ["red"]}, [370, 261, 492, 50, 492, 261, 119, 106, 316, 492],
             [70, 261, 492, 105, 420, 109, 261, 492, 371, 317]),
    "gemma": ({"extra_special_tokens": {"my_token": {"content": "red", "__type": "AddedToken"}}},
              [333, 292, 279, 49, 279, 292, 260, 297, 279],
              [69, 292, 279, 301, 298, 296, 300, 292, 279, 292, 333, 264]),
    "siglip2": ({"extra_special_tokens": ["red"]}, [311, 308, 261, 292, 279, 49, 279, 292, 260, 297, 279],
                [297, 292, 279, 301, 298, 296, 300, 292, 279, 273, 308, 261, 264]),
    "clip": ({"pad_token": "a"}, [329, 65, 256, 290, 385, 290, 81, 256, 64, 290],
             [271, 280, 67, 67, 327, 429, 290, 329, 65, 256, 64]),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_texts_are_split_at_pieces_listed_as_special(tmp_path, name):
    """Or as a special token, as "!" is the pad of some CLIPs. The ids are those of transformers 5.24."""
    files, *expected = LISTED[name]
    place = tmp_path / name
    if name == "tiny":
        place.mkdir()
        shutil.copy(SHIPPED["tiny"] / "tokenizer.json", place)
    else:
        shutil.copytree(GOLDEN / name, place)
    config = place / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(values | files))
    load = load_text_tokenizer if name in ("siglip2", "clip") else load_tokenizer
    assert [load(place).encode(text) for text in ("cube red-red reared", "A reddish red cube a")] == expected
    config.write_text(json.dumps(values | {"additional_special_tokens": ["<new>"]}))
    with pytest.raises(
        UserError, match="additional_special_tokens = '<new>', expected a token that a piece or an added"
    ):
        load(place)


@pytest.mark.parametrize("name", ["gemma", "siglip2", "clip"])
def test_added_tokens_of_a_dual_encoder_may_not_be_other_pieces(tmp_path, name):
    place = tmp_path / name
    shutil.copytree(GOLDEN / name, place)
    vocab = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    piece = next(each for each in vocab if each.isalpha() and len(each) > 1)
    (place / "added_tokens.json").write_text(json.dumps({piece: 9_999}))
    with pytest.raises(UserError, match=f"adds '{piece}' = 9999, but that is a piece already, {vocab[piece]}"):
        load_text_tokenizer(place)


def test_two_tokenizers_in_one_folder_are_refused(folder):
    place = folder()
    shutil.copy(GEMMA / "tokenizer.json", place)
    with pytest.raises(UserError, match="tokenizer.json beside it differ in .* pieces, expected one tokenizer"):
        load_tokenizer(place)


def test_splits_at_the_leftmost_longest_token():
    split = Splitter(
        [AddedToken(1, "ab"), AddedToken(2, "abc"), AddedToken(3, "bcd"), AddedToken(4, "e", normalized=True)]
    )
    assert split("abcdeab") == [2, "d", 4, 1]
    assert split("") == [] and split("x") == ["x"]
    word = Splitter([AddedToken(1, "cat", single_word=True), AddedToken(2, "<x>", lstrip=True, rstrip=True)])
    assert word("cat cats a_cat cat") == [1, " cats a_cat ", 1]
    assert word("a \n<x>\t <x> b") == ["a", 2, 2, "b"]


def test_a_model_without_rows_for_added_tokens_is_refused(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    pg.weights.save_hugging_face(pg.load("tiny"), place, tokenizer="tiny")  # rows beyond the last word are padding
    pg.load(place)
    (place / "added_tokens.json").write_text(json.dumps({"<answer>": 1792}))
    with pytest.raises(UserError, match=r"adds the token '<answer>' = 1792 .* vocab_size=1793"):
        pg.load(place)
    assert pg.load(place, vocab_size=1793).config.decoder.vocab_size == 1793
    (place / "added_tokens.json").write_text(json.dumps({"<image>": 1718}))
    pg.load(place)  # the image's row is never read


def test_a_damaged_tokenizer_is_reported_when_a_model_is_loaded(tmp_path):
    pg.weights.save_hugging_face(pg.load("tiny"), tmp_path, tokenizer="tiny")
    (tmp_path / "tokenizer.model").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"tokenizer.model is no SentencePiece model"):
        pg.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for model in ("unigram", {"vocab": 5}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"model": model}), encoding="utf-8")
        with pytest.raises(UserError, match="tokenizer.json cannot be read as a tokenizer"):
            pg.load(tmp_path)


def test_any_number_of_special_tokens_is_spelled_out(folder):
    words, plain = load_tokenizer(folder(model=False)), load_tokenizer("tiny")
    text = "<unk>" * 3000 + " a <bos>"
    assert words.encode(text) == plain.encode(text)
