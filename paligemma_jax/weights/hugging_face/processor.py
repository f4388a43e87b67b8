"""Reads and writes a Hugging Face folder's image preprocessing: preprocessor_config.json or processor_config.json."""

from pathlib import Path

from paligemma_jax.files.side_files import KnownKeys, account, read_json, refusal
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.folder_write import write_json
from train_jax.core.errors import UserError

IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"
NESTED = "image_processor"
# The tokenizer's and the chat's keys are not needed: prompts are built by data/prompts.py.
KEYS = KnownKeys(
    read=frozenset({NESTED}),
    idle=frozenset(
        {"_processor_class", "chat_template", "image_seq_length", "image_token", "image_token_id", "processor_class"}
    ),
)


def read_preprocessing(folder: Path, family: str, vision: ViTConfig) -> Preprocessing | None:
    """Returns a folder's own preprocessing, None if it has none.

    As in transformers 5, processor_config.json takes precedence over preprocessor_config.json, which older releases
    wrote.

    Args:
      folder: of a model.
      family: the image processor class to assume if none is named, see images.image_processor.
      vision: the tower that the images are for.

    Raises:
      UserError: a file that is broken, a step that is not supported, or another image size than the tower's.
    """
    entry = None
    if (folder / WHOLE).exists():
        values = read_json(folder / WHOLE)
        account(values, KEYS, folder / WHOLE)
        if values.get(NESTED) is not None:
            entry = values[NESTED], folder / WHOLE, f"{NESTED}."
    if entry is None and (folder / IMAGES).exists():
        entry = read_json(folder / IMAGES), folder / IMAGES, ""
    if entry is None:
        return None
    values, file, section = entry
    if not isinstance(values, dict):
        raise UserError(f"{file} has no object at {NESTED}: download it again.")
    preprocessing = Preprocessing.from_hugging_face(values, family, str(file), section)
    if preprocessing.size != vision.image_size:
        key = "crop_size" if preprocessing.resized else "size"
        raise refusal(
            file,
            f"{section}{key}",
            values.get(key, preprocessing.size),
            f"the {vision.image_size} pixels a side that the vision tower takes",
            "correct it",
        )
    return preprocessing


def write_preprocessing(folder: Path, preprocessing: Preprocessing, **others) -> None:
    """Writes preprocessor_config.json, which all releases read; `others` are further keys of it.

    A processor_config.json of an earlier save in the folder would take precedence over it, and is removed.
    """
    (folder / WHOLE).unlink(missing_ok=True)
    write_json(folder / IMAGES, preprocessing.to_hugging_face() | others)
