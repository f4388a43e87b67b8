"""Tokenizers for the text tower of a dual encoder: `texts -> tokens, mask`, both [B, length].

  SigLIP     a red cube </s> </s> </s>      lower case; EOS last, however long the text; padded with EOS
  SigLIP 2   a red cube <eos> <pad> <pad>   the same with Gemma's pieces, padded with its own pad
  CLIP       <start> a red cube <end> <end> byte-level BPE between two marks; read up to the first end

SigLIP was trained to attend to its padding: its mask is all True; CLIP's is True up to the first end. So the mask can
always be passed to the model. The pooled position is the last (SigLIP) or the first end (CLIP): SigLIP's texts must
have the full length.
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

PIECES = ("spiece.model", "tokenizer.model")  # names of the SentencePiece files of SigLIP and Gemma
START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
LONGEST = 1 << 20  # a larger model_max_length means none
LENGTHS = {"siglip": 64, "clip": 77}  # tokens per text in the released models
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Turns texts into tokens; see the module.

    Attributes:
      encode: text to ids, without special tokens.
      vocab_size: number of rows that the model's embedding must have.
      length: tokens of every text; longer texts are cut, keeping the end mark.
      eos_id, pad_id: ids of the mark after a text, and of the padding after it.
      bos_id: id of the mark before a text, for CLIP; None for SigLIP.
      file: the file it was read from.
    """

    encode: Callable[[str], list[int]]
    vocab_size: int
    length: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    file: Path

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of texts.

        Args:
          texts: unchanged texts; lower case and punctuation are handled here as the model's family does.

        Returns:
          tokens: int32 [B, length].
          mask: bool [B, length], True on tokens that the model attends to, for its `mask`.

        Raises:
          UserError: a value that is not text, or one text in place of a list.
        """
        if isinstance(texts, str | bytes):
            raise UserError(f"texts are the one text {quoted(texts)}, expected a list: put it into one.")
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
        """Raises UserError unless an embedding of `vocab_size` rows covers every id."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the text tower's vocabulary has {vocab_size:,} entries but {self.file} needs {self.vocab_size:,}: "
                "give the tokenizer that belongs to these weights."
            )


def load_text_tokenizer(
    path: str | Path, length: int | None = None, *, keep_punctuation: bool | None = None
) -> TextTokenizer:
    """Loads the tokenizer of a SigLIP or a CLIP. Tokens that the files beside it add are included.

    Args:
      path: a folder with `spiece.model` or `tokenizer.model` (SentencePiece: SigLIP 1 and 2), or with `tokenizer.json`
        (CLIP, SigLIP 2); one of these files; hf://owner/name; a .npz with one beside it; a run's workdir; "tiny" or
        "tiny-siglip".
      length: tokens per text, the model's `config.text.length`; None: the length in tokenizer_config.json, else that of
        the released models, 64 or CLIP's 77.
      keep_punctuation: for SigLIP; None keeps it except for SigLIP 1, whose tokenizer in transformers removes it, as do
        big_vision's zero-shot evaluations (its training kept it).

    Raises:
      UserError: no such file, a file of another kind, or files that contradict one another.
    """
    file = _find(path)
    if length is not None and length < 2:
        raise UserError(f"the length of texts is {length}, expected 2 tokens or more, with the end mark: increase it.")
    if file.suffix == ".json":
        return _from_json(file, length, keep_punctuation)
    return _from_pieces(file, length, keep_punctuation)


def _find(path: str | Path) -> Path:
    """Returns the tokenizer's file."""
    folder = hub.download(path) if hub.is_remote(path) else local(path)
    if folder.suffix == ".npz":
        folder = folder.parent
    if folder.is_file():
        return folder
    files = [folder / name for name in (*PIECES, JSON) if (folder / name).is_file()]
    if not files:
        raise UserError(f"{path} holds no {', '.join(PIECES)} or {JSON}, expected one: give the tokenizer's folder.")
    return files[0]


def _from_pieces(file: Path, length: int | None, keep_punctuation: bool | None) -> TextTokenizer:
    """Returns SigLIP's tokenizer, from a SentencePiece file; one with a BOS is Gemma's (SigLIP 2)."""
    pieces = SentencePieces(file.read_bytes(), str(file))
    eos = pieces.mark("eos")
    if eos is None:
        raise UserError(f"{file} has no end-of-sentence piece, which SigLIP's texts end in: give another tokenizer.")
    gemma, size = pieces.mark("bos") is not None, pieces.size
    beside = _SideFiles.read(file, pieces.index)
    added = [token for token in beside.added if gemma or token.id >= size] + beside.listed
    if added and not gemma:
        raise UserError(
            f"the files beside {file} add {added[0].content!r} = {added[0].id}, expected no more than its {size:,} "
            "pieces, as SigLIP 1 has no added tokens here: remove it."
        )
    check_pieces(added, pieces.index, size, file)
    beside.check_token("eos_token", pieces.index, eos)
    pad = beside.token("pad", pieces.index, pieces.mark("pad") if gemma else eos)
    lower = gemma or beside.values.get("do_lower_case") is not False
    encode = _canonical(pieces.encode, gemma if keep_punctuation is None else keep_punctuation, lower)
    length = length or beside.length or LENGTHS["siglip"]
    return TextTokenizer(_around(added, encode), _size(size, added), length, eos, pad, None, file)


def _from_json(file: Path, length: int | None, keep_punctuation: bool | None) -> TextTokenizer:
    """Returns CLIP's tokenizer, or SigLIP 2's as transformers saves it, from a tokenizer.json."""
    model = open_json(file)
    ids, beside = model.get_vocab(with_added_tokens=True), _SideFiles.read(file, model.token_to_id)

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    pieces = model.get_vocab(with_added_tokens=False)
    check_pieces(beside.added, pieces.get, 1 + max(pieces.values(), default=-1), file)
    size = _size(1 + max(ids.values(), default=-1), beside.added)
    start, end = model.token_to_id(START), model.token_to_id(END)
    if start is not None and end is not None:
        beside.check_token("bos_token", model.token_to_id, start)
        beside.check_token("eos_token", model.token_to_id, end)
        pad = beside.token("pad", model.token_to_id, end)
        added = [token for token in beside.added if ids.get(token.content) != token.id]
        length = length or beside.length or LENGTHS["clip"]
        return TextTokenizer(_around(added + beside.listed, encode), size, length, end, pad, start, file)
    end = beside.token("eos", model.token_to_id, model.token_to_id("<eos>"))
    pad = beside.token("pad", model.token_to_id, model.token_to_id("<pad>"))
    canonical = _around(beside.added + beside.listed, _canonical(encode, keep_punctuation is not False))
    return TextTokenizer(canonical, size, length or beside.length or LENGTHS["siglip"], end, pad, None, file)


@dataclasses.dataclass(frozen=True)
class _SideFiles:
    """The contents of the files beside a tokenizer's own file.

    Attributes:
      added: tokens that they add.
      listed: pieces that texts are split at too.
      marks: text of each special token and the file that names it, by key.
      values: the object in tokenizer_config.json, which is `file`.
    """

    added: list[AddedToken]
    listed: list[AddedToken]
    marks: dict[str, tuple[Path, str]]
    values: dict[str, Any]
    file: Path

    @classmethod
    def read(cls, file: Path, index: Callable[[str], int | None]) -> "_SideFiles":
        """Reads them; empty for a file of another name, which has none. `index` returns the id of a piece.

        Raises:
          UserError: files that are broken, contradict one another, or pad or truncate on the left.
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
        """Tokens per text, if the files give a sensible number."""
        length = self.values.get("model_max_length")
        return length if type(length) is int and 2 <= length <= LONGEST else None

    def token(self, name: str, index: Callable[[str], int | None], default: int | None) -> int:
        """Returns the id of "eos" or "pad": of the token that the files name, else `default`. Raises UserError."""
        key = f"{name}_token"
        if key not in self.marks:
            if default is None:
                raise UserError(f"{self.file.parent} has no {key}, expected a CLIP's or a SigLIP's: give another.")
            return default
        file, text = self.marks[key]
        result = {token.content: token.id for token in self.added}.get(text, index(text))
        if result is None:
            raise refusal(file, key, text, "a token that the tokenizer has", "use the model's own files")
        return result

    def check_token(self, key: str, index: Callable[[str], int | None], expected: int) -> None:
        """Refuses a special token that is not the family's."""
        file, text = self.marks.get(key, (self.file, None))
        if text is not None and index(text) != expected:
            raise refusal(file, key, text, f"the token {expected}", "use the model's own tokenizer")


def _size(pieces: int, added: Sequence[AddedToken]) -> int:
    """Returns the number of rows that the model's embedding must have."""
    return max([pieces, *(1 + token.id for token in added)])


def _around(added: Sequence[AddedToken], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Returns an `encode` that splits texts at added tokens and encodes the text between them."""
    if not added:
        return encode
    split = Splitter(added)
    return lambda text: [index for part in split(text) for index in ([part] if isinstance(part, int) else encode(part))]


def _canonical(encode: Callable[[str], list[int]], keep_punctuation: bool, lower: bool = True):
    """Returns `encode` of lower-case text, without punctuation and double spaces as for SigLIP 1 in transformers."""

    def canonical(text: str) -> list[int]:
        text = text.lower() if lower else text
        return encode(text if keep_punctuation else " ".join(text.translate(_NO_PUNCTUATION).split()))

    return canonical
