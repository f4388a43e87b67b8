r"""PaliGemma's tokenizer: Gemma's pieces with PaliGemma's location and segmentation tokens appended.

An unmodified Gemma `tokenizer.model` has 256,000 pieces. PaliGemma's ids follow:

    ids 0 .. 3            <pad> <eos> <bos> <unk>
    ids 4 .. base - 1     the other pieces of the model, "\n" among them (108 in Gemma's)
    base + 0 .. 1023      <loc0000> .. <loc1023>    a coordinate in 1024ths of the image
    base + 1024 .. 1151   <seg000> .. <seg127>      a code of a segmentation mask
    base + 1152           <image>                   placeholder of transformers; big_vision's table ends before it

Tokens that the files already list (exports do, and users add their own) keep their ids. Where these occupy the ids
above, PaliGemma's tokens follow after them, `<image>` first, as transformers' processor adds them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

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
from paligemma_jax.data.tokenizers.pieces import JsonPieces, Pieces, SentencePieces
from paligemma_jax.files import hub
from paligemma_jax.files.shipped import local
from paligemma_jax.files.side_files import read_json, refusal
from train_jax.core.errors import UserError

MODEL = "tokenizer.model"
_SPECIALS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
_MARKS = tuple(f"<{name}>" for name in _SPECIALS)
_LOCATIONS = tuple(f"<loc{i:04d}>" for i in range(1024))
_SEGMENTS = tuple(f"<seg{i:03d}>" for i in range(128))
_IMAGE = "<image>"
_APPENDED = (*_LOCATIONS, *_SEGMENTS, _IMAGE)
_TAB = "<0x09>"  # Gemma's tokenizer.json has the character itself
_OTHER = 0.01  # largest share of pieces in which two files may differ, as reserved pieces get renamed


class Tokenizer:
    """Encodes and decodes text; `decode(encode(text)) == text` except for U+2581, SentencePiece's mark for a space.

    Raises UserError if the model is not laid out as Gemma's: pad 0, eos 1, bos 2, unk 3, and a newline of one id.
    """

    pad_id, eos_id, bos_id, unk_id = _SPECIALS.values()

    def __init__(self, model: bytes | Pieces, name: str = MODEL, added: Mapping[str, AddedToken] | None = None):
        """Builds a tokenizer from its pieces.

        Args:
          model: the bytes of a SentencePiece file, or opened pieces.
          name: its name in error messages.
          added: tokens that its files add, by their text.
        """
        self._pieces: Pieces = SentencePieces(model, name) if isinstance(model, bytes) else model
        self.added = dict(added or {})
        ids = {key: self._pieces.index(f"<{key}>") for key in _SPECIALS}
        if ids != _SPECIALS:
            raise UserError(f"{name} has special ids {ids}, expected {_SPECIALS}; give a Gemma tokenizer.model.")
        self._base = self._pieces.size
        check_pieces(self.added.values(), self._pieces.index, self._base, name)
        tokens = self._paligemma_tokens() | self.added
        self._tokens = {content: token for content, token in tokens.items() if token.id >= len(_SPECIALS)}
        self._appended = {token.id: content for content, token in self._tokens.items()}
        if len(self._appended) < len(self._tokens):
            twice = next(token for content, token in self._tokens.items() if self._appended[token.id] != content)
            raise UserError(
                f"{name} and the files beside it give {twice.content} and {self._appended[twice.id]} the id "
                f"{twice.id}, expected one token per id: add tokens after those of PaliGemma."
            )
        self._split = Splitter(self._tokens.values())
        marks = (AddedToken(index, f"<{name}>", special=True) for name, index in _SPECIALS.items())
        self._split_marks = Splitter([*self._tokens.values(), *marks])
        self.separator_ids = self.encode("\n")
        if len(self.separator_ids) != 1 or self.decode(self.separator_ids) != "\n":
            raise UserError(
                f"{name} encodes a newline as {self.separator_ids}, expected one id; give a Gemma tokenizer.model."
            )

    def _paligemma_tokens(self) -> dict[str, AddedToken]:
        """Returns locations, segments and the image by their text, with the ids of the files or after the pieces.

        If other tokens occupy those ids, they follow after the last of them, the image first, as transformers'
        processor adds them.
        """
        added = {content: token.id for content, token in self.added.items()}
        listed = {piece: added.get(piece, self._pieces.index(piece)) for piece in _APPENDED}
        ids = {piece: index for piece, index in listed.items() if index is not None}
        new = {piece: self._base + i for i, piece in enumerate(_APPENDED) if piece not in ids}
        taken = set(added.values()) | set(ids.values())
        if taken & set(new.values()):
            free = max(taken | {self._base - 1}) + 1
            new = {piece: free + i for i, piece in enumerate(sorted(new, key=lambda piece: piece != _IMAGE))}
        return {piece: AddedToken((ids | new)[piece], piece) for piece in _APPENDED}

    @property
    def vocab_size(self) -> int:
        """Number of ids that a text can contain: pieces, locations, segments and added tokens, without `<image>`."""
        return max(self._base, 1 + max(index for index, content in self._appended.items() if content != _IMAGE))

    @property
    def image_id(self) -> int:
        """Id of transformers' `<image>` placeholder; may be `vocab_size`, one past a big_vision embedding."""
        return self._tokens[_IMAGE].id

    @property
    def model_bytes(self) -> bytes:
        """Content of the file with the pieces, tokenizer.model or tokenizer.json."""
        return next(iter(self._pieces.files.values()))

    @property
    def extra(self) -> list[AddedToken]:
        """The added tokens that are not pieces with the same ids."""
        return [token for token in self.added.values() if self._pieces.index(token.content) != token.id]

    @property
    def marks(self) -> tuple[str, ...]:
        """The tokens that the format itself sets: `<bos>`, `<eos>`, `<pad>` and `<image>`."""
        return (*(f"<{name}>" for name in ("bos", "eos", "pad")), _IMAGE)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files that `load_tokenizer(folder)` reads as this tokenizer; the folder must exist."""
        files = self._pieces.files
        if self.added:
            decoder = {str(token.id): token.to_dict() for token in self.added.values()}
            files[CONFIG] = (json.dumps({"added_tokens_decoder": decoder}, indent=2) + "\n").encode()
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)

    def loc(self, index: int) -> int:
        """Returns the id of `<loc0000>` + index, index in [0, 1024)."""
        return self._tokens[_LOCATIONS[index]].id

    def seg(self, index: int) -> int:
        """Returns the id of `<seg000>` + index, index in [0, 128)."""
        return self._tokens[_SEGMENTS[index]].id

    def encode(self, text: str, marks: bool = False) -> list[int]:
        """Returns the ids of a text, without BOS and EOS; text around added tokens is encoded apart, as in big_vision.

        Args:
          text: any text.
          marks: whether `<bos>`, `<eos>`, `<pad>` and `<unk>` in it are read as tokens, as in transformers, instead of
            as characters, as in big_vision.
        """
        ids = []
        for part in (self._split_marks if marks else self._split)(text):
            ids += [part] if isinstance(part, int) else self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first EOS; pads and BOS are skipped; an id without a piece gives `<unk>`."""
        text, run = [], []
        for index in map(int, ids):
            if index == self.eos_id:
                break
            if index in (self.pad_id, self.bos_id):
                continue
            if 0 <= index < self._base and index not in self._appended:
                run.append(index)  # decoded together: a character may span several byte pieces
            else:
                text += [self._pieces.decode(run), self.piece(index)]
                run = []
        return "".join([*text, self._pieces.decode(run)])

    def piece(self, index: int) -> str:
        """Returns an id as printed in batches: `<bos>`, `<loc0007>`, or the piece with U+2581 for its space."""
        if index in self._appended:
            return self._appended[index]
        return self._pieces.piece(int(index)) if 0 <= index < self._base else "<unk>"

    def index(self, content: str) -> int | None:
        """Returns the id of a piece, a special token or an added token; None for other texts."""
        token = self._tokens.get(content)
        return self._pieces.index(content) if token is None else token.id

    def fits(self, vocab_size: int) -> None:
        """Raises UserError unless an embedding of `vocab_size` rows covers every id that a text can contain."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"The model's vocabulary has {vocab_size:,} entries but the tokenizer needs {self.vocab_size:,}; "
                "use the tokenizer.model that belongs to these weights."
            )


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer of "tiny" (ships with the package), of a folder with `tokenizer.model`, or of that file.

    A folder may be a Hugging Face download, hf://owner/name or a run's workdir; for a big_vision .npz, the file beside
    it is used. A folder with only a `tokenizer.json`, as transformers 5 writes it, is read from that. Tokens that the
    files beside it add are included.

    Raises:
      UserError: no such file, another layout than Gemma's, or files that contradict one another.
    """
    path = os.fspath(path)
    file = local(hub.download(path) if hub.is_remote(path) else path)
    if file.suffix == ".npz":
        file = file.parent
    if file.is_dir():
        file = next((file / name for name in (MODEL, JSON) if (file / name).is_file()), file / MODEL)
    if not file.is_file():
        raise UserError(
            f"No tokenizer at {file}; give a tokenizer.model or tokenizer.json, a folder that holds one, or 'tiny'."
        )
    beside = file.name in (MODEL, JSON)
    added = read_added_tokens(file.parent) if beside else {}
    is_json = file.suffix == ".json"
    pieces = JsonPieces(file, _MARKS) if is_json else SentencePieces(file.read_bytes(), str(file))
    if beside and not is_json and (file.parent / JSON).is_file():
        _check_pieces(pieces, file, file.parent / JSON)
    if beside:
        skip = {*added, *_APPENDED}
        added |= {token.content: token for token in listed_tokens(file.parent, pieces.index, skip)}
    tokenizer = Tokenizer(pieces, str(file), added)
    if beside:
        _check_names(tokenizer, file.parent)
    return tokenizer


def _check_names(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuses special tokens other than Gemma's, tokens without an id, and options that change texts."""
    for key, (file, contents) in named_tokens(folder).items():
        for content in contents:
            index = tokenizer.index(content)
            if index is None and key != "mask_token":  # appended by transformers, and unused here
                raise refusal(file, key, content, "a token that a piece or an added token has", "add it with its id")
            name = key.removesuffix("_token")
            if name in ("bos", "eos") and index != _SPECIALS[name]:
                raise refusal(file, key, content, f"<{name}>", "the model reads that one")
    if (file := folder / CONFIG).is_file():
        values = read_json(file)
        for key in ("do_lower_case", "clean_up_tokenization_spaces"):
            if values.get(key):
                raise refusal(file, key, values[key], "false, as PaliGemma's", "set it so")


def _check_pieces(pieces: Pieces, file: Path, other: Path) -> None:
    """Refuses a tokenizer.json with another tokenizer's pieces, which transformers would read instead."""
    model = read_json(other).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of a unigram model, [piece, score] each
        vocab = {entry[0]: index for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    ids = vocab if isinstance(vocab, dict) else {}
    names = (pieces.piece(index) for index in range(pieces.size))
    wrong = sum(ids.get("\t" if name == _TAB and _TAB not in ids else name) != at for at, name in enumerate(names))
    if wrong > _OTHER * pieces.size:
        raise UserError(
            f"{file} and {other.name} beside it differ in {wrong:,} of {pieces.size:,} pieces, expected one tokenizer: "
            "remove the file that is not the model's."
        )
