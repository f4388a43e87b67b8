"""How a Hugging Face folder says that images are prepared: preprocessor_config.json, or processor_config.json."""

from pathlib import Path

from paligemma_jax.files.side_files import Keys, account, read_json, refusal
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.folder_write import write_json
from train_jax.core.errors import UserError

IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"
NESTED = "image_processor"
# Of the tokenizer's and the chat's part nothing is needed: prompts are made by data/prompts.py.
KEYS = Keys(
    read=frozenset({NESTED}),
    idle=frozenset(
        {"_processor_class", "chat_template", "image_seq_length", "image_token", "image_token_id", "processor_class"}
    ),
)


def read_preprocessing(folder: Path, family: str, vision: ViTConfig) -> Preprocessing | None:
    """A folder's own preprocessing, None where it has none.

    As in transformers 5, what processor_config.json holds goes before preprocessor_config.json, which older releases
    wrote.

    Args:
      folder: of a model.
      family: the class of image processor that stands for one that is not named, see data.image_processor.
      vision: the tower that the images are for.

    Raises:
      UserError: a file that is broken, a step that is not supported, or another image size than the tower's.
    """
    found = None
    if (folder / WHOLE).exists():
        values = read_json(folder / WHOLE)
        account(values, KEYS, folder / WHOLE)
        if values.get(NESTED) is not None:
            found = values[NESTED], folder / WHOLE, f"{NESTED}."
    if found is None and (folder / IMAGES).exists():
        found = read_json(folder / IMAGES), folder / IMAGES, ""
    if found is None:
        return None
    values, file, section = found
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

    A processor_config.json of an earlier save in the folder would go before it, and is removed.
    """
    (folder / WHOLE).unlink(missing_ok=True)
    write_json(folder / IMAGES, preprocessing.to_hugging_face() | others)
