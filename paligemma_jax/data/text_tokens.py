"""Texts as a dual encoder's text tower reads them: `texts -> tokens, mask`, both [B, length].

  SigLIP     a red cube </s> </s> </s>      lower-cased; EOS last, however long the text; padded with EOS
  SigLIP 2   a red cube <eos> <pad> <pad>   likewise with Gemma's pieces, padded with its own pad
  CLIP       <start> a red cube <end> <end> byte-level pairs between two marks; read up to the first end

SigLIP was trained to read its padding: the mask is all True there, and True up to the first end in CLIP. So the mask
can always be given to the model. The pooled position is the last (SigLIP) or the first end (CLIP): SigLIP's texts
must have the full length.
"""

import dataclasses
import importlib
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from paligemma_jax import hub
from paligemma_jax.shipped import local
from train_jax.errors import UserError

PIECES = ("spiece.model", "tokenizer.model")  # SentencePiece files, as SigLIP and Gemma call them
JSON = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
LENGTHS = {"siglip": 64, "clip": 77}  # tokens of a text in the released models
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Makes tokens of texts; see the module.

    Attributes:
      encode: text to ids, without marks.
      vocab_size: rows that the model's word table must have.
      length: tokens of every text; longer ones are cut, keeping the end mark.
      eos_id, pad_id: of the mark behind a text, and of what fills up behind that.
      bos_id: of the mark in front, CLIP's; None in SigLIP.
      file: where it was read from.
    """

    encode: Callable[[str], list[int]]
    vocab_size: int
    length: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    file: Path

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of texts.

        Args:
          texts: as they are; what the model's family does to them (lower case, punctuation) is done here.

        Returns:
          tokens: int32 [B, length].
          mask: bool [B, length], True on tokens that the model reads, for its `mask`.
        """
        front = [] if self.bos_id is None else [self.bos_id]
        tokens = np.full((len(texts), self.length), self.pad_id, np.int32)
        mask = np.full(tokens.shape, self.bos_id is None)
        for row, text in enumerate(texts):
            ids = [*front, *self.encode(text)][: self.length - 1] + [self.eos_id]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask

    def fits(self, vocab_size: int) -> None:
        """Raises UserError unless a word table of `vocab_size` rows has one for every id."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the text tower has {vocab_size:,} words but {self.file} needs {self.vocab_size:,}, expected as many: "
                "give the tokenizer that belongs to these weights."
            )


def load_text_tokenizer(
    path: str | Path, length: int | None = None, *, keep_punctuation: bool | None = None
) -> TextTokenizer:
    """The tokenizer of a SigLIP or a CLIP.

    Args:
      path: a folder with `spiece.model` or `tokenizer.model` (SentencePiece: SigLIP 1 and 2), or with `tokenizer.json`
        (CLIP, SigLIP 2; needs the extra [clip]); one of these files; hf://owner/name; a .npz that has one beside it; a
        run's workdir; "tiny" or "tiny-siglip".
      length: tokens of a text, the model's `config.text.length`; None is the released models', 64 or CLIP's 77.
      keep_punctuation: of SigLIP; None keeps it but for SigLIP 1, whose tokenizer in transformers removes it, as do
        big_vision's zero-shot evaluations (its training kept it).

    Raises:
      UserError: no such file, or of another kind.
    """
    file = _find(path)
    if length is not None and length < 2:
        raise UserError(f"texts of {length} tokens are asked for, expected 2 or more: one is the mark at the end.")
    if file.suffix == ".json":
        return _from_json(file, length, keep_punctuation)
    return _from_pieces(file, length, keep_punctuation)


def _find(path: str | Path) -> Path:
    """The tokenizer's file."""
    place = hub.download(path) if hub.is_remote(path) else local(path)
    if place.suffix == ".npz":
        place = place.parent
    if place.is_file():
        return place
    found = [place / name for name in (*PIECES, JSON) if (place / name).is_file()]
    if not found:
        raise UserError(f"{path} holds no {', '.join(PIECES)} or {JSON}, expected one: give the tokenizer's folder.")
    return found[0]


def _from_pieces(file: Path, length: int | None, keep_punctuation: bool | None) -> TextTokenizer:
    """SigLIP's, from a SentencePiece file; one with a BOS is Gemma's, as of SigLIP 2."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError:
        raise UserError(f"{file} is no SentencePiece model: give the tokenizer's own file or folder.") from None
    eos = pieces.eos_id()
    if eos < 0:
        raise UserError(f"{file} has no end-of-sentence piece, which SigLIP's texts end in: give another tokenizer.")
    gemma = pieces.bos_id() >= 0
    encode = _canonical(pieces.encode, gemma if keep_punctuation is None else keep_punctuation)
    pad = pieces.pad_id() if gemma else eos
    return TextTokenizer(encode, pieces.vocab_size(), length or LENGTHS["siglip"], eos, pad, None, file)


def _from_json(file: Path, length: int | None, keep_punctuation: bool | None) -> TextTokenizer:
    """CLIP's, or SigLIP 2's as transformers saves it, from a tokenizer.json."""
    try:
        library: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise UserError(
            f"{file} needs the tokenizers library, which is not installed: pip install 'paligemma-jax[clip]'."
        ) from None
    try:
        words = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{file} cannot be read as a tokenizer ({error}): download it again.") from None
    words.no_truncation()
    words.no_padding()

    def encode(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False).ids

    def index(name: str) -> int | None:
        return words.token_to_id(name)

    size = words.get_vocab_size()
    start, end = index(START), index(END)
    if start is not None and end is not None:
        pad = index(_special(file, "pad_token") or END)
        return TextTokenizer(encode, size, length or LENGTHS["clip"], end, end if pad is None else pad, start, file)
    end, pad = (index(_special(file, f"{name}_token") or f"<{name}>") for name in ("eos", "pad"))
    if end is None or pad is None:
        raise UserError(f"{file} has no {START} or <eos>, expected the tokenizer of a CLIP or a SigLIP: give another.")
    encode = _canonical(encode, keep_punctuation is not False)
    return TextTokenizer(encode, size, length or LENGTHS["siglip"], end, pad, None, file)


def _special(file: Path, key: str) -> str | None:
    """What the tokenizer_config.json beside a file calls one of its marks, if it says."""
    config = file.with_name("tokenizer_config.json")
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get(key) if config.is_file() else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is not a JSON object ({error}): download it again.") from None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _canonical(encode: Callable[[str], list[int]], keep_punctuation: bool) -> Callable[[str], list[int]]:
    """`encode` of texts in lower case; without punctuation and double spaces, as transformers has it in SigLIP 1."""

    def canonical(text: str) -> list[int]:
        text = text.lower()
        return encode(text if keep_punctuation else " ".join(text.translate(_NO_PUNCTUATION).split()))

    return canonical
