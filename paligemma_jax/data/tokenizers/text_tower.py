"""Texts as a dual encoder's text tower reads them: `texts -> tokens, mask`, both [B, length].

  SigLIP     a red cube </s> </s> </s>      lower-cased; EOS last, however long the text; padded with EOS
  SigLIP 2   a red cube <eos> <pad> <pad>   likewise with Gemma's pieces, padded with its own pad
  CLIP       <start> a red cube <end> <end> byte-level pairs between two marks; read up to the first end

SigLIP was trained to read its padding: the mask is all True there, and True up to the first end in CLIP. So the mask
can always be given to the model. The pooled position is the last (SigLIP) or the first end (CLIP): SigLIP's texts
must have the full length.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.row_texts import check_prompt
from paligemma_jax.data.tokenizers.added_tokens import (
    CONFIG,
    JSON,
    AddedToken,
    Splitter,
    check_pieces,
    listed_tokens,
    named_tokens,
    read_added_tokens,
)
from paligemma_jax.data.tokenizers.pieces import SentencePieces, open_json
from paligemma_jax.files import hub
from paligemma_jax.files.shipped import local
from paligemma_jax.files.side_files import read_json, refusal
from train_jax.core.errors import UserError, quoted

PIECES = ("spiece.model", "tokenizer.model")  # SentencePiece files, as SigLIP and Gemma call them
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
LONGEST = 1 << 20  # a model_max_length beyond it stands for none
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

        Raises:
          UserError: what is no text, or one text in place of several.
        """
        if isinstance(texts, str | bytes):
            raise UserError(f"texts are the one text {quoted(texts)}, expected several: give a list of it.")
        for text in texts:
            check_prompt(text, "the text")
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
        (CLIP, SigLIP 2); one of these files; hf://owner/name; a .npz that has one beside it; a
        run's workdir; "tiny" or "tiny-siglip".
      length: tokens of a text, the model's `config.text.length`; None is what tokenizer_config.json says, else the
        released models', 64 or CLIP's 77.
      keep_punctuation: of SigLIP; None keeps it but for SigLIP 1, whose tokenizer in transformers removes it, as do
        big_vision's zero-shot evaluations (its training kept it).

    Tokens that the files beside it add are read along.

    Raises:
      UserError: no such file, or of another kind, or files that contradict one another.
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
    pieces = SentencePieces(file.read_bytes(), str(file))
    eos = pieces.mark("eos")
    if eos is None:
        raise UserError(f"{file} has no end-of-sentence piece, which SigLIP's texts end in: give another tokenizer.")
    gemma, size = pieces.mark("bos") is not None, pieces.size
    said = _Said.of(file, pieces.index)
    added = [token for token in said.added if gemma or token.id >= size] + said.listed
    if added and not gemma:
        raise UserError(
            f"the files beside {file} add {added[0].content!r} = {added[0].id}, expected no more than its {size:,} "
            "pieces, as SigLIP 1 has no added tokens here: remove it."
        )
    check_pieces(added, pieces.index, size, file)
    said.agrees("eos_token", pieces.index, eos)
    pad = said.token("pad", pieces.index, pieces.mark("pad") if gemma else eos)
    lower = gemma or said.values.get("do_lower_case") is not False
    encode = _canonical(pieces.encode, gemma if keep_punctuation is None else keep_punctuation, lower)
    length = length or said.length or LENGTHS["siglip"]
    return TextTokenizer(_around(added, encode), _size(size, added), length, eos, pad, None, file)


def _from_json(file: Path, length: int | None, keep_punctuation: bool | None) -> TextTokenizer:
    """CLIP's, or SigLIP 2's as transformers saves it, from a tokenizer.json."""
    words = open_json(file)
    known, said = words.get_vocab(with_added_tokens=True), _Said.of(file, words.token_to_id)

    def encode(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False).ids

    own = words.get_vocab(with_added_tokens=False)
    check_pieces(said.added, own.get, 1 + max(own.values(), default=-1), file)
    size = _size(1 + max(known.values(), default=-1), said.added)
    start, end = words.token_to_id(START), words.token_to_id(END)
    if start is not None and end is not None:
        said.agrees("bos_token", words.token_to_id, start)
        said.agrees("eos_token", words.token_to_id, end)
        pad = said.token("pad", words.token_to_id, end)
        added = [token for token in said.added if known.get(token.content) != token.id]
        encode = _around(added + said.listed, encode)
        length = length or said.length or LENGTHS["clip"]
        return TextTokenizer(encode, size, length, end, pad, start, file)
    end = said.token("eos", words.token_to_id, words.token_to_id("<eos>"))
    pad = said.token("pad", words.token_to_id, words.token_to_id("<pad>"))
    encode = _around(said.added + said.listed, _canonical(encode, keep_punctuation is not False))
    return TextTokenizer(encode, size, length or said.length or LENGTHS["siglip"], end, pad, None, file)


@dataclasses.dataclass(frozen=True)
class _Said:
    """What the files beside a tokenizer's own file say.

    Attributes:
      added: tokens that are added.
      listed: pieces that texts are cut at too.
      marks: what they are called and the file that says so, by key.
      values: of tokenizer_config.json, `file`.
    """

    added: list[AddedToken]
    listed: list[AddedToken]
    marks: dict[str, tuple[Path, str]]
    values: dict[str, Any]
    file: Path

    @classmethod
    def of(cls, file: Path, index: Callable[[str], int | None]) -> "_Said":
        """Nothing for a file of another name, which belongs to no folder; `index` gives the id of a piece.

        Raises:
          UserError: files that are broken, contradict one another, or pad or cut on the left.
        """
        config = file.with_name(CONFIG)
        if file.name not in (*PIECES, JSON):
            return cls([], [], {}, {}, config)
        marks = {key: (named, texts[0]) for key, (named, texts) in named_tokens(file.parent).items() if texts}
        values = read_json(config) if config.is_file() else {}
        for key in ("padding_side", "truncation_side"):
            if values.get(key) not in (None, "right"):
                raise refusal(config, key, values[key], "'right', as in training", "set it so")
        if type(values.get("do_lower_case")) not in (bool, type(None)):
            raise refusal(config, "do_lower_case", values["do_lower_case"], "true or false", "correct it")
        added = read_added_tokens(file.parent)
        listed = listed_tokens(file.parent, index, added)
        return cls(list(added.values()), listed, marks, values, config)

    @property
    def length(self) -> int | None:
        """Tokens of a text, where a sensible number is said."""
        length = self.values.get("model_max_length")
        return length if type(length) is int and 2 <= length <= LONGEST else None

    def token(self, name: str, index: Callable[[str], int | None], default: int | None) -> int:
        """The id of "eos" or "pad": of the text that the files call so, else the default. Raises UserError for none."""
        key = f"{name}_token"
        if key not in self.marks:
            if default is None:
                raise UserError(f"{self.file.parent} has no {key}, expected a CLIP's or a SigLIP's: give another.")
            return default
        file, text = self.marks[key]
        found = {token.content: token.id for token in self.added}.get(text, index(text))
        if found is None:
            raise refusal(file, key, text, "a token that the tokenizer has", "use the model's own files")
        return found

    def agrees(self, key: str, index: Callable[[str], int | None], expected: int) -> None:
        """Refuses a mark that is another token than the family's."""
        file, text = self.marks.get(key, (self.file, None))
        if text is not None and index(text) != expected:
            raise refusal(file, key, text, f"the token {expected}", "use the model's own tokenizer")


def _size(pieces: int, added: Sequence[AddedToken]) -> int:
    """Rows that a word table must have."""
    return max([pieces, *(1 + token.id for token in added)])


def _around(added: Sequence[AddedToken], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` of what stands between added tokens."""
    if not added:
        return encode
    split = Splitter(added)
    return lambda text: [index for part in split(text) for index in ([part] if isinstance(part, int) else encode(part))]


def _canonical(encode: Callable[[str], list[int]], keep_punctuation: bool, lower: bool = True):
    """`encode` of texts in lower case; without punctuation and double spaces, as transformers has it in SigLIP 1."""

    def canonical(text: str) -> list[int]:
        text = text.lower() if lower else text
        return encode(text if keep_punctuation else " ".join(text.translate(_NO_PUNCTUATION).split()))

    return canonical
