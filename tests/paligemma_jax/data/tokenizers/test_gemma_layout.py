"""PaliGemma's ids with a stand-in for Gemma's own tokenizer of the same size and layout."""

import pytest
from sentencepiece import sentencepiece_model_pb2

from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from train_jax.core.errors import UserError

PIECES = 256_000
NEWLINE, FIRST_BYTE = 108, 217


def gemma_pieces() -> list[tuple[str, int]]:
    """Pieces and types in the order of Gemma's file: specials, unused, newlines, spaces, tags, bytes, text."""
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    specials = [(name, kinds.CONTROL) for name in ("<pad>", "<eos>", "<bos>")] + [("<unk>", kinds.UNKNOWN)]
    reserved = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99))]
    reserved += ["<start_of_turn>", "<end_of_turn>"]
    reserved += ["\n" * count for count in range(1, 32)]
    reserved += ["\u2581" * count for count in range(2, 32)]
    reserved += [f"<tag{i}>" for i in range(FIRST_BYTE - len(specials) - len(reserved))]
    pieces = specials + [(piece, kinds.USER_DEFINED) for piece in reserved]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    text = [*"\u2581abcdefghijklmnopqrstuvwxyz", "re", "red", "\u2581c", "\u2581cu", "be", "\u2581cube"]
    pieces += [(piece, kinds.NORMAL) for piece in text]
    return pieces + [(f"\u2581filler{i}", kinds.NORMAL) for i in range(PIECES - len(pieces))]


@pytest.fixture(scope="module")
def gemma():
    """The file's content."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    for index, name in enumerate(("pad", "eos", "bos", "unk")):
        setattr(proto.trainer_spec, f"{name}_id", index)
        setattr(proto.trainer_spec, f"{name}_piece", f"<{name}>")
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds, pieces = proto.SentencePiece, gemma_pieces()
    normal = [kind for _, kind in pieces].index(kinds.NORMAL)
    proto.pieces.extend(
        kinds(piece=piece, type=kind, score=float(min(normal - i, 0))) for i, (piece, kind) in enumerate(pieces)
    )
    return proto.SerializeToString()


def test_ids_of_an_unmodified_gemma_tokenizer(gemma):
    tokenizer = Tokenizer(gemma)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.separator_ids == [NEWLINE]
    assert tokenizer.loc(0) == 256_000 and tokenizer.loc(1023) == 257_023
    assert tokenizer.seg(0) == 257_024 and tokenizer.seg(127) == 257_151
    assert tokenizer.vocab_size == 257_152 and tokenizer.image_id == 257_152


def test_texts_with_added_tokens_round_trip(gemma):
    tokenizer = Tokenizer(gemma)
    text = "red cube\n<loc0000><seg000>"
    ids = tokenizer.encode(text)
    first = FIRST_BYTE + 256  # the id of the first piece of text
    assert [tokenizer.piece(index) for index in ids[:2]] == ["red", "\u2581cube"] and min(ids[:2]) > first
    assert ids[2:] == [NEWLINE, 256_000, 257_024] and tokenizer.decode(ids) == text
    assert tokenizer.encode("\n\n") == [NEWLINE + 1]
    assert tokenizer.encode("\u00e9") == [FIRST_BYTE + 0xC3, FIRST_BYTE + 0xA9]


def test_vocabulary_fits_released_embeddings_and_no_smaller_one(gemma):
    tokenizer = Tokenizer(gemma)
    tokenizer.fits(257_152)  # big_vision
    tokenizer.fits(257_216)  # transformers, padded
    with pytest.raises(UserError, match="vocabulary has 257,151 entries but the tokenizer needs 257,152"):
        tokenizer.fits(257_151)
