"""Learned pieces of a tokenizer, from a SentencePiece file or from a tokenizer.json of the tokenizers library."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from train_jax.core.errors import UserError


class Pieces(Protocol):
    """Maps text to pieces and back, without added tokens."""

    @property
    def size(self) -> int:
        """Number of pieces."""
        ...

    @property
    def files(self) -> dict[str, bytes]:
        """The files that the pieces can be read from again, content by name."""
        ...

    def index(self, piece: str) -> int | None:
        """Returns the id of a piece, None if there is none."""
        ...

    def piece(self, index: int) -> str:
        """Returns the piece with an id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        ...


class SentencePieces:
    """The pieces of a SentencePiece file."""

    def __init__(self, model: bytes, name: str):
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name} is no SentencePiece model; give the tokenizer's own file.") from error

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._model.vocab_size()

    @property
    def files(self) -> dict[str, bytes]:
        """The SentencePiece file."""
        return {"tokenizer.model": self._model.serialized_model_proto()}

    def mark(self, name: str) -> int | None:
        """Returns the file's id for "bos", "eos" or "pad", None if it has none."""
        index = getattr(self._model, f"{name}_id")()
        return None if index < 0 else index

    def index(self, piece: str) -> int | None:
        """Returns the id of a piece, None if there is none."""
        index = self._model.piece_to_id(piece)
        return None if index == self._model.unk_id() and piece != self._model.id_to_piece(index) else index

    def piece(self, index: int) -> str:
        """Returns the piece with an id."""
        return self._model.id_to_piece(index)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._model.decode(list(ids))


class JsonPieces:
    """The pieces of a tokenizer.json, without the special tokens that its post-processor sets.

    Texts are split at added tokens before they get here (added_tokens.py). `spelled` lists special tokens that a text
    may contain as plain characters, such as `<bos>`.
    """

    def __init__(self, file: Path, spelled: Sequence[str] = ()):
        self._model, self._content = open_json(file), file.read_bytes()
        # Special tokens are pieces too, which a unigram model would match in text: split after each one's first letter.
        marks = "|".join(f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in spelled)
        self._cut = re.compile(marks) if marks else None

    @property
    def size(self) -> int:
        """Number of pieces."""
        return 1 + max(self._model.get_vocab(with_added_tokens=False).values(), default=-1)

    @property
    def files(self) -> dict[str, bytes]:
        """The tokenizer.json."""
        return {"tokenizer.json": self._content}

    def index(self, piece: str) -> int | None:
        """Returns the id of a piece, None if there is none."""
        return self._model.token_to_id(piece)

    def piece(self, index: int) -> str:
        """Returns the piece with an id, `<unk>` if there is none."""
        return self._model.id_to_token(index) or "<unk>"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        if self._cut is None:
            return self._plain(text)
        starts = [0, *(match.end() for match in self._cut.finditer(text)), len(text)]
        return [index for start, end in itertools.pairwise(starts) for index in self._plain(text[start:end])]

    def _plain(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._model.decode(list(ids), skip_special_tokens=False)


def open_json(file: Path) -> Any:
    """Opens a tokenizer.json; texts are neither truncated nor padded.

    Raises:
      UserError: the file is no tokenizer.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{file} cannot be read as a tokenizer ({error}): download it again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
