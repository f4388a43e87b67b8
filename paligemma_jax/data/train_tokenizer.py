"""Builds the tokenizer that ships with the tiny model: one piece per word of CLEVR, bytes for anything else.

    python -m paligemma_jax.data.train_tokenizer --output=paligemma_jax/tiny/tokenizer.model

also writes tokenizer.json, the same tokenizer for transformers 5, which would read the .model's pieces as a BPE.

The texts come from the synthetic generator, so all words are known. Each becomes two pieces, with and without its
leading space, and all pieces have the same score: SentencePiece's best segmentation is then the one with the fewest
pieces, whatever the word counts. No trainer runs, so the file is the same on every machine.
Text is neither normalised nor prefixed with a space, so decoding returns exactly the encoded text.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as _pb2

from paligemma_jax.data.synthetic_clevr.pretraining_texts import pretraining_segments
from paligemma_jax.data.synthetic_clevr.questions import generate_questions
from paligemma_jax.data.synthetic_clevr.scenes import sample_scene

_SPACE = "\u2581"  # SentencePiece's mark for a space
_WORD = re.compile(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]")
_LOCATION = re.compile(r"<loc\d{4}>")
_SCENES = 400  # 100 scenes already contain every word

# The words of the official CLEVR v1.0 questions and answers, which stay single pieces if the generator uses fewer.
_OFFICIAL = """
a an and another any anything are as ball balls behind big block blocks blue both brown color cube cubes cyan cylinder
cylinders do does either else equal fewer front gray greater green has have how in is it its large left less made many
material matte metal metallic more no number object objects of on or other purple red right rubber same shape shiny
side size small sphere spheres than that the there thing things tiny to visible what yellow yes
Are Do Does How Is The There What ? ; . , 0 1 2 3 4 5 6 7 8 9 10
"""
_PROMPTS = "answer caption detect point describe question segment ocr en"  # PaliGemma's task words


ModelProto: Any = vars(_pb2)["ModelProto"]  # made at import; the library's stub does not have it


def synthetic_texts(scenes: int = _SCENES) -> Iterator[str]:
    """Yields questions, answers and pretraining texts of scenes that belong to no split."""
    for index in range(scenes):
        scene = sample_scene((0x70, index))
        for item in generate_questions(scene, 10, (0x71, index)):
            yield from (item["question"], item["answer"])
        for segment in pretraining_segments(scene, np.random.Generator(np.random.PCG64((0x72, index))), 20):
            yield from segment


def words(texts: Iterable[str]) -> list[str]:
    """Returns the distinct words, numbers and punctuation marks, sorted, without `<loc0000>` tokens."""
    return sorted({word for text in texts for word in _WORD.findall(_LOCATION.sub(" ", text))})


def build_model(vocabulary: Iterable[str]) -> bytes:
    """Returns a SentencePiece unigram model (file content): 4 specials, newline, 256 bytes, space, each word twice."""
    proto = ModelProto()
    kinds = proto.SentencePiece
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.trainer_spec.byte_fallback = True
    specials = ("pad", "eos", "bos", "unk")  # Gemma's names and ids
    for index, key in enumerate(specials):
        setattr(proto.trainer_spec, f"{key}_id", index)
        setattr(proto.trainer_spec, f"{key}_piece", f"<{key}>")
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True

    pieces = [(f"<{key}>", kinds.UNKNOWN if key == "unk" else kinds.CONTROL) for key in specials]
    pieces += [("\n", kinds.USER_DEFINED)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(_SPACE, kinds.NORMAL)]
    pieces += [(space + word, kinds.NORMAL) for word in vocabulary for space in ("", _SPACE)]
    for piece, kind in pieces:
        score = -1.0 if kind == kinds.NORMAL else 0.0
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def to_json(model: bytes) -> str:
    """Returns the output of `build_model` in the format of the tokenizers library: a tokenizer.json."""
    proto = ModelProto.FromString(model)
    kinds = proto.SentencePiece
    added = {kinds.CONTROL: True, kinds.UNKNOWN: True, kinds.USER_DEFINED: False}
    space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": piece.piece, **flags, "special": added[piece.type]}
            for index, piece in enumerate(proto.pieces)
            if piece.type in added
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "Unigram",
            "unk_id": proto.trainer_spec.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
            "byte_fallback": True,
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Writes the tokenizer to `--output`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="file to write, for example tokenizer.model")
    output = parser.parse_args(arguments).output
    model = build_model(words([*synthetic_texts(), _OFFICIAL, _PROMPTS]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model)
    output.with_suffix(".json").write_text(to_json(model), encoding="utf-8")
    print(f"{output}: {len(ModelProto.FromString(model).pieces)} pieces, {len(model):,} bytes")


if __name__ == "__main__":
    main()
