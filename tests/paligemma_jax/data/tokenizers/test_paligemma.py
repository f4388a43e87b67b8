"""Tokenizer: Gemma's layout with appended tokens, exact round trips, and refused files."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer
from paligemma_jax.data.train_tokenizer import build_model
from train_jax.core.errors import UserError

TINY = load_tokenizer("tiny")
BASE = build_model(["red", "cube"])  # 266 pieces: 4 specials, newline, 256 bytes, space, two words in two variants


def edited(edit):
    proto = sentencepiece_model_pb2.ModelProto.FromString(BASE)
    edit(proto)
    return proto.SerializeToString()


def test_added_ids_follow_the_base_vocabulary():
    tokenizer = Tokenizer(BASE)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.separator_ids == [4]
    assert tokenizer.loc(0) == 266 and tokenizer.loc(1023) == 266 + 1023
    assert tokenizer.seg(0) == 266 + 1024 and tokenizer.seg(127) == 266 + 1151
    assert tokenizer.vocab_size == 266 + 1152 and tokenizer.image_id == 266 + 1152
    text = "red<loc0000><loc1023> cube\n<seg000><seg127><image>"
    ids = tokenizer.encode(text)
    red, cube = tokenizer.encode("red"), tokenizer.encode(" cube")
    assert ids == [*red, 266, 266 + 1023, *cube, 4, 266 + 1024, 266 + 1151, 266 + 1152]
    assert tokenizer.decode(ids) == text


def test_near_misses_are_plain_text():
    for text in ("<loc1024>", "<loc001>", "<seg128>", "<loc00010>", "<Loc0001>"):
        ids = TINY.encode(text)
        assert max(ids) < TINY.loc(0) and TINY.decode(ids) == text


def test_control_pieces_cannot_be_typed():
    for text in ("<bos>", "<eos>", "<pad>"):
        assert min(TINY.encode(text)) > 3 and TINY.decode(TINY.encode(text)) == text


def test_tokens_that_the_model_has_keep_their_ids():
    def add(proto):
        for piece in [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)] + ["tail"]:
            proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.USER_DEFINED)

    tokenizer = Tokenizer(edited(add))
    assert tokenizer.loc(5) == 266 + 5 and tokenizer.seg(127) == 266 + 1151
    assert tokenizer.vocab_size == 266 + 1153  # the piece after them has the largest id
    assert tokenizer.encode("red<loc0005>") == [*Tokenizer(BASE).encode("red"), 271]
    assert tokenizer.decode([271, 5 + 0x41]) == "<loc0005>A"


def test_decode_stops_at_the_first_eos_and_skips_pads_and_bos():
    red = TINY.encode("red")
    assert TINY.decode([0, 2, *red, 0, *TINY.encode(" cube"), 1, *red]) == "red cube"
    assert TINY.decode([]) == "" and TINY.decode([1, *red]) == ""
    assert TINY.decode([*red, 10**6, -1]) == "red<unk><unk>"  # a padded embedding row may win the arg-max


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    assert TINY.decode(TINY.encode(text)) == text


def test_copies_are_the_same_tokenizer():
    text = "detect cube\n<loc0100> é漢"
    for copy in (pickle.loads(pickle.dumps(TINY)), Tokenizer(TINY.model_bytes)):  # grain sends it to its workers
        assert copy.encode(text) == TINY.encode(text) and copy.vocab_size == TINY.vocab_size


def test_vocabulary_that_does_not_fit():
    TINY.fits(TINY.vocab_size)
    TINY.fits(257_216)
    with pytest.raises(UserError, match=rf"1,000 entries .* needs {TINY.vocab_size:,};"):
        TINY.fits(1000)


def test_loading_from_a_file_a_folder_and_the_package(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(BASE)
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(str(tmp_path / "tokenizer.model")).vocab_size == 1418
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"No tokenizer at .*empty.tokenizer.model"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "junk.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "junk.model")


def test_other_layouts_are_refused():
    def swap_specials(proto):
        proto.pieces[0].piece, proto.pieces[1].piece = "<eos>", "<pad>"

    with pytest.raises(UserError, match=r"special ids .*'pad': 1.* expected .*'pad': 0"):
        Tokenizer(edited(swap_specials))

    def lose_newline(proto):
        proto.pieces[4].piece = "x"
        proto.trainer_spec.byte_fallback = False  # else the newline is still one id, that of its byte
        for piece in proto.pieces[5:261]:
            piece.type = proto.SentencePiece.UNUSED

    with pytest.raises(UserError, match="encodes a newline as"):
        Tokenizer(edited(lose_newline))
