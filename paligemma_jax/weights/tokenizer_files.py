"""Copies the tokenizer's files beside a checkpoint, and adds what transformers also needs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from paligemma_jax.data.tokenizers.added_tokens import ADDED, CONFIG, JSON, SPECIAL, read_added_tokens
from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer
from paligemma_jax.data.tokenizers.pieces import JsonPieces, SentencePieces
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer, load_text_tokenizer
from paligemma_jax.files.shipped import local
from train_jax.core.errors import UserError

MODEL = "tokenizer.model"
SIGLIP_MODEL = "spiece.model"
OF_PALIGEMMA = re.compile(r"<(image|loc\d{4}|seg\d{3})>")  # tokens that PaliGemma's tokenizer always adds
# Files that transformers has written beside the weights of PaliGemma, SigLIP and CLIP over its releases.
FILES = (
    *(MODEL, SIGLIP_MODEL, JSON, CONFIG, "vocab.json", "merges.txt"),
    *(SPECIAL, ADDED, "generation_config.json"),
)


def tokenizer_files(source: str | Path) -> list[Path]:
    """Returns the tokenizer files of a shipped model, a folder, beside a .npz, or a SentencePiece file; [] if none."""
    path = local(source)
    if path.name in (MODEL, SIGLIP_MODEL) and path.is_file():
        return [path]
    if not path.exists():
        return []
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return files if {file.name for file in files} & {MODEL, SIGLIP_MODEL, JSON} else []


def check_added_tokens(folder: Path, rows: int) -> None:
    """Refuses tokens that a folder's files add beyond a token embedding with `rows` rows.

    The tokenizer's own pieces, and PaliGemma's tokens for images, locations and segments, are not checked: a task
    checks the tokenizer that it uses.

    Raises:
      UserError: the first such token.
    """
    first = max(rows, _num_pieces(folder))
    for token in read_added_tokens(folder).values():
        if token.id >= first and not OF_PALIGEMMA.fullmatch(token.content):
            raise UserError(
                f"{folder} adds the token {token.content!r} = {token.id} to its tokenizer, expected ids below the "
                f"{rows:,} rows of the token embedding: give the weights that belong to it, or of a PaliGemma load "
                f"them with vocab_size={token.id + 1}."
            )


def _num_pieces(folder: Path) -> int:
    """Returns the number of pieces of a folder's tokenizer, without added tokens; 0 if it has none."""
    if (file := folder / MODEL).is_file():
        return SentencePieces(file.read_bytes(), str(file)).size
    return JsonPieces(file).size if (file := folder / JSON).is_file() else 0


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the tokenizer's files into `folder`, and writes a tokenizer_config.json where the source has none.

    Raises:
      UserError: `source` holds no tokenizer.
    """
    _copy(source, folder)
    if not (folder / CONFIG).exists() and (folder / MODEL).exists():
        config = tokenizer_config(load_tokenizer(folder))  # which is all that transformers reads added tokens from
        if (folder / JSON).exists():  # the tiny model's, which is not a BPE as Gemma's
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_config(folder, config)


def copy_text_tokenizer(source: str | Path, folder: Path, length: int = 64) -> None:
    """Copies the files of a dual encoder with texts of `length` tokens; SigLIP 1's model gets its transformers name."""
    _copy(source, folder)
    tokenizer = load_text_tokenizer(folder)
    if tokenizer.file.name == MODEL and tokenizer.pad_id == tokenizer.eos_id:  # beside a big_vision file
        tokenizer = dataclasses.replace(tokenizer, file=tokenizer.file.replace(folder / SIGLIP_MODEL))
    if not (folder / CONFIG).exists() and tokenizer.file.name != JSON:
        (folder / JSON).unlink(missing_ok=True)  # the classes below build their own from the pieces
        _write_config(folder, text_tokenizer_config(tokenizer, length))


def _copy(source: str | Path, folder: Path) -> None:
    files = tokenizer_files(source)
    if not files:
        raise UserError(
            f"{source} holds no {MODEL}, {SIGLIP_MODEL} or {JSON}: give the folder of the model's tokenizer."
        )
    if any(file.parent.resolve() == folder.resolve() for file in files):
        return
    for name in FILES:  # files of another tokenizer would be read together with the new ones
        (folder / name).unlink(missing_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def text_tokenizer_config(tokenizer: TextTokenizer, length: int) -> dict[str, Any]:
    """Returns the tokenizer_config.json for the SentencePiece model of a SigLIP 1 or 2."""
    if tokenizer.pad_id == tokenizer.eos_id:
        marks = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        return {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "model_max_length": length, **marks}
    return {
        "tokenizer_class": "Siglip2Tokenizer",
        "model_max_length": length,
        "padding_side": "right",
        "add_bos_token": False,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer_config.json for Gemma's SentencePiece model: special tokens, locations and segments."""
    image = tokenizer.image_id
    plain = [tokenizer.loc(i) for i in range(1024)] + [tokenizer.seg(i) for i in range(128)]
    special = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id, image]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(index): {"content": tokenizer.piece(index), **flags, "special": index in special}
        for index in sorted({*special, *plain})
    } | {str(token.id): token.to_dict() for token in tokenizer.extra}
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "extra_special_tokens": {"image_token": tokenizer.piece(image)},
        "added_tokens_decoder": added,
    }
