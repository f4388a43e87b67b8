"""The tokenizer's files beside a checkpoint: copied as they are, completed where transformers needs more."""

import json
import shutil
from pathlib import Path
from typing import Any

from paligemma_jax.data.tokenizer import Tokenizer, load_tokenizer
from train_jax.errors import UserError

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
# What transformers has written beside PaliGemma's weights over its releases.
FILES = (MODEL, "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "generation_config.json")
TINY = Path(__file__).parent.parent / "tiny"


def tokenizer_files(source: str | Path) -> list[Path]:
    """The tokenizer's files of "tiny", of a folder, beside a .npz, or a tokenizer.model itself; [] if none."""
    place = TINY if str(source) == "tiny" else Path(source).expanduser()
    if place.name == MODEL and place.is_file():
        return [place]
    if not place.exists():
        return []
    folder = place if place.is_dir() else place.parent
    found = [folder / name for name in FILES if (folder / name).is_file()]
    return found if {file.name for file in found} & {MODEL, "tokenizer.json"} else []


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the tokenizer's files into `folder`, and writes a tokenizer_config.json where the source has none.

    Raises:
      UserError: `source` holds no tokenizer.
    """
    files = tokenizer_files(source)
    if not files:
        raise UserError(f"{source} holds no {MODEL} and no tokenizer.json: give the folder of the model's tokenizer.")
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    if not (folder / CONFIG).exists() and (folder / MODEL).exists():
        values = tokenizer_config(load_tokenizer(folder))
        (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers must know beside Gemma's SentencePiece model: special tokens, locations and segments."""
    image = tokenizer.image_id
    plain = [tokenizer.loc(i) for i in range(1024)] + [tokenizer.seg(i) for i in range(128)]
    special = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id, image]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(index): {"content": tokenizer.piece(index), **flags, "special": index in special}
        for index in sorted({*special, *plain})
    }
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
