"""Text to ids and back: a SentencePiece model with PaliGemma's location and segmentation tokens appended.

An unmodified Gemma `tokenizer.model` has 256,000 pieces. PaliGemma counts on from there:

    ids 0 .. 3            <pad> <eos> <bos> <unk>
    ids 4 .. base - 1     the other pieces of the model, "\\n" among them (108 in Gemma's)
    base + 0 .. 1023      <loc0000> .. <loc1023>    a coordinate in 1024ths of the picture
    base + 1024 .. 1151   <seg000> .. <seg127>      a code of a segmentation mask
    base + 1152           <image>                   placeholder of transformers; big_vision's table ends before it

A model that already holds these pieces (some exports do) keeps the ids it has.
"""

import os
import re
from collections.abc import Iterable

import sentencepiece

from paligemma_jax import hub
from paligemma_jax.shipped import local
from train_jax.errors import UserError

_SPECIALS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
_LOCATIONS = tuple(f"<loc{i:04d}>" for i in range(1024))
_SEGMENTS = tuple(f"<seg{i:03d}>" for i in range(128))
_IMAGE = "<image>"
_APPENDED = (*_LOCATIONS, *_SEGMENTS, _IMAGE)
_SPLIT = re.compile(r"(<loc(?:0\d{3}|10[01]\d|102[0-3])>|<seg(?:0\d\d|1[01]\d|12[0-7])>|<image>)")


class Tokenizer:
    """Encodes and decodes text; `decode(encode(text)) == text` but for U+2581, SentencePiece's mark for a space.

    Raises UserError where the model is not laid out as Gemma's: pad 0, eos 1, bos 2, unk 3, and a newline of one id.
    """

    pad_id, eos_id, bos_id, unk_id = _SPECIALS.values()

    def __init__(self, model: bytes, name: str = "tokenizer.model"):
        """`model`: the bytes of a SentencePiece file; `name`: what error messages call it."""
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name} is no SentencePiece model; give a Gemma tokenizer.model.") from error
        found = {key: getattr(self._pieces, f"{key}_id")() for key in _SPECIALS}
        if found != _SPECIALS:
            raise UserError(f"{name} has special ids {found}, expected {_SPECIALS}; give a Gemma tokenizer.model.")
        self._base = self._pieces.vocab_size()
        self._id_of = {piece: self._look_up(piece, self._base + i) for i, piece in enumerate(_APPENDED)}
        self._appended = {index: piece for piece, index in self._id_of.items()}
        self.separator_ids = self.encode("\n")
        if len(self.separator_ids) != 1 or self.decode(self.separator_ids) != "\n":
            raise UserError(
                f"{name} encodes a newline as {self.separator_ids}, expected one id; give a Gemma tokenizer.model."
            )

    def _look_up(self, piece: str, otherwise: int) -> int:
        index = self._pieces.piece_to_id(piece)
        return otherwise if index == self.unk_id else index

    @property
    def vocab_size(self) -> int:
        """Number of ids that text can need: the model's pieces and the locations and segments, `<image>` apart."""
        return max(self._base, 1 + max(self._id_of[piece] for piece in (_LOCATIONS[-1], _SEGMENTS[-1])))

    @property
    def image_id(self) -> int:
        """Id of transformers' `<image>` placeholder; may be `vocab_size`, one past a big_vision embedding."""
        return self._id_of[_IMAGE]

    @property
    def model_bytes(self) -> bytes:
        """The SentencePiece file's content, for a copy beside a checkpoint."""
        return self._pieces.serialized_model_proto()

    def loc(self, index: int) -> int:
        """Id of `<loc0000>` + index, index in [0, 1024)."""
        return self._id_of[_LOCATIONS[index]]

    def seg(self, index: int) -> int:
        """Id of `<seg000>` + index, index in [0, 128)."""
        return self._id_of[_SEGMENTS[index]]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS; the pieces around a location are encoded apart, as in big_vision."""
        ids = []
        for part in filter(None, _SPLIT.split(text)):
            ids += [self._id_of[part]] if part in self._id_of else self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first EOS; pads and BOS are skipped, an id that no piece has (a padded row) is `<unk>`."""
        text, run = [], []
        for index in map(int, ids):
            if index == self.eos_id:
                break
            if index in (self.pad_id, self.bos_id):
                continue
            if 0 <= index < self._base and index not in self._appended:
                run.append(index)  # decoded together: a character may be spread over several byte pieces
            else:
                text += [self._pieces.decode(run), self.piece(index)]
                run = []
        return "".join([*text, self._pieces.decode(run)])

    def piece(self, index: int) -> str:
        """How one id is written in a printed batch: `<bos>`, `<loc0007>`, or the piece with U+2581 for its space."""
        if index in self._appended:
            return self._appended[index]
        return self._pieces.id_to_piece(int(index)) if 0 <= index < self._base else "<unk>"

    def fits(self, vocab_size: int) -> None:
        """Raises UserError unless an embedding of `vocab_size` rows has one for every id that text can need."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"The model's vocabulary has {vocab_size:,} entries but the tokenizer needs {self.vocab_size:,}; "
                "use the tokenizer.model that belongs to these weights."
            )


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of "tiny" (ships with the package), of a folder that holds `tokenizer.model`, or of that file.

    A folder may be a Hugging Face download, hf://owner/name or a run's workdir; a big_vision .npz has it beside it.
    Raises UserError when there is no such file.
    """
    if hub.is_remote(path):
        path = hub.download(path)
    file = local(path)
    if file.suffix == ".npz":
        file = file.parent
    if file.is_dir():
        file = file / "tokenizer.model"
    if not file.is_file():
        raise UserError(f"No tokenizer at {file}; give a tokenizer.model, a folder that holds one, or 'tiny'.")
    return Tokenizer(file.read_bytes(), str(file))
