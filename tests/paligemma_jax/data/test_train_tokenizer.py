"""The tokenizer that ships: reproducible, small, one piece per word of CLEVR and of the pretraining texts."""

import re
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from paligemma_jax.data import train_tokenizer
from paligemma_jax.data.synthetic_clevr.attributes import ANSWERS
from paligemma_jax.data.synthetic_clevr.pretraining_texts import pretraining_segments
from paligemma_jax.data.synthetic_clevr.questions import generate_questions
from paligemma_jax.data.synthetic_clevr.scenes import sample_scene
from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer

TINY = load_tokenizer("tiny")


def test_the_shipped_file_is_what_the_command_writes(tmp_path):
    train_tokenizer.main(["--output", str(tmp_path / "new" / "tokenizer.model")])
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == TINY.model_bytes
    shipped = Path(train_tokenizer.__file__).parent.parent / "tiny/tokenizer.json"
    assert (tmp_path / "new" / "tokenizer.json").read_text() == shipped.read_text()


def test_the_json_is_the_same_tokenizer():
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(TINY.model_bytes)
    words = tokenizers.Tokenizer.from_str(train_tokenizer.to_json(TINY.model_bytes))
    texts = [*train_tokenizer.synthetic_texts(3), "ß 漢字\n ?", "  two  spaces ", ""]
    for text in texts:
        assert words.encode(text, add_special_tokens=False).ids == pieces.encode(text), text
        assert words.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text)), text


def test_it_is_small():
    assert len(TINY.model_bytes) < 30_000
    assert TINY.vocab_size - 1152 < 800


def test_every_word_of_unseen_texts_is_one_piece():
    texts = list(ANSWERS)
    for index in range(30):
        scene = sample_scene((99, index))
        texts += [item["question"] for item in generate_questions(scene, 10, (100, index))]
        for segment in pretraining_segments(scene, np.random.default_rng(index), 20):
            texts += segment
    for text in texts:
        expected = re.findall(r"<loc\d{4}>|[ ]?[A-Za-z]+|[ ]?\d+|[ ]?[^\w\s<]|\s", text)
        assert [TINY.decode([i]) for i in TINY.encode(text)] == expected


def test_answers_are_single_ids():
    assert all(len(TINY.encode(answer)) == 1 for answer in ANSWERS)


def test_fewest_pieces_win():
    tokenizer = Tokenizer(train_tokenizer.build_model(["a", "are", "red"]))
    assert [tokenizer.piece(i) for i in tokenizer.encode("are  red a")] == ["are", "▁", "▁red", "▁a"]
    assert len(tokenizer.encode("é")) == 2  # UTF-8 bytes
    assert train_tokenizer.words(["Are <loc0001>2 cubes; are"]) == ["2", ";", "Are", "are", "cubes"]
