"""The pieces that texts are cut into, from a SentencePiece file or from a tokenizer.json of the tokenizers library."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from train_jax.core.errors import UserError


class Pieces(Protocol):
    """Text to pieces and back, added tokens apart."""

    @property
    def size(self) -> int:
        """Number of pieces."""
        ...

    @property
    def files(self) -> dict[str, bytes]:
        """What they can be read from again, by the file's name."""
        ...

    def index(self, piece: str) -> int | None:
        """The id of a piece, None if there is no such."""
        ...

    def piece(self, index: int) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class SentencePieces:
    """Those of a SentencePiece file."""

    def __init__(self, model: bytes, name: str):
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name} is no SentencePiece model; give the tokenizer's own file.") from error

    @property
    def size(self) -> int:
        return self._model.vocab_size()

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model.serialized_model_proto()}

    def mark(self, name: str) -> int | None:
        """The id that the file has for "bos", "eos" or "pad", None where it has none."""
        index = getattr(self._model, f"{name}_id")()
        return None if index < 0 else index

    def index(self, piece: str) -> int | None:
        index = self._model.piece_to_id(piece)
        return None if index == self._model.unk_id() and piece != self._model.id_to_piece(index) else index

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


class JsonPieces:
    """Those of a tokenizer.json, without the marks that its post-processor sets.

    Its added tokens are cut out of texts by others (added_tokens.py); `spelled` are marks that a text may hold as
    plain characters, `<bos>` and such.
    """

    def __init__(self, file: Path, spelled: Sequence[str] = ()):
        self._model, self._content = open_json(file), file.read_bytes()
        # A mark is a piece too, which a unigram model would take for text: cut behind the first character of each.
        marks = "|".join(f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in spelled)
        self._cut = re.compile(marks) if marks else None

    @property
    def size(self) -> int:
        return 1 + max(self._model.get_vocab(with_added_tokens=False).values(), default=-1)

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content}

    def index(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def piece(self, index: int) -> str:
        return self._model.id_to_token(index) or "<unk>"

    def encode(self, text: str) -> list[int]:
        if self._cut is None:
            return self._plain(text)
        starts = [0, *(match.end() for match in self._cut.finditer(text)), len(text)]
        return [index for start, end in itertools.pairwise(starts) for index in self._plain(text[start:end])]

    def _plain(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=False)


def open_json(file: Path) -> Any:
    """A tokenizer.json, opened; texts are neither cut nor padded.

    Raises:
      UserError: it is none.
    """
    try:
        words = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{file} cannot be read as a tokenizer ({error}): download it again.") from None
    words.no_truncation()
    words.no_padding()
    return words
