"""PaliGemma 1 and 2 as transformers saves them: folders read, and written so that transformers opens them.

For SigLIP and CLIP see dual_encoder.py.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from paligemma_jax.files.side_files import refusal
from paligemma_jax.images.image_processor import SIGLIP
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.hugging_face import dual_encoder
from paligemma_jax.weights.hugging_face.folder import Folder
from paligemma_jax.weights.hugging_face.folder_write import SHARD_SIZE, write_folder
from paligemma_jax.weights.hugging_face.paligemma_config import model_config, read_config, to_hugging_face, untied
from paligemma_jax.weights.hugging_face.paligemma_names import EMBEDDING, rows
from paligemma_jax.weights.hugging_face.processor import read_preprocessing, write_preprocessing
from paligemma_jax.weights.name_table import write_rows
from paligemma_jax.weights.tokenizer_files import copy_tokenizer
from train_jax.core import param_tree
from train_jax.core.errors import UserError

LM_HEAD = "lm_head.weight"
IMAGE_TOKEN = 257_152  # in all released models


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder as transformers saves it, also a dual encoder's; the tied output embedding may be stored twice.

    Raises:
      UserError: files that are missing, broken or of another architecture, or an untied output embedding.
    """
    if dual_encoder.is_dual_encoder(folder):
        return dual_encoder.open_folder(folder)
    arrays, values = Folder(folder), read_config(folder)
    config = model_config(values, arrays)
    preprocessing = read_preprocessing(folder, SIGLIP, config.vision) or Preprocessing.siglip(config.vision.image_size)
    config = dataclasses.replace(config, preprocessing=preprocessing)
    names = arrays.names()
    if LM_HEAD in names and not np.array_equal(arrays[LM_HEAD], arrays[EMBEDDING]):
        raise UserError(f"{folder}: {LM_HEAD} differs from {EMBEDDING}, expected the tied table: tie them.")
    if LM_HEAD not in names and untied(values):
        raise refusal(folder / "config.json", "tie_word_embeddings", False, f"true, as there is no {LM_HEAD}", "set it")
    return Checkpoint(arrays, names - {LM_HEAD}, rows(config.decoder.post_norms), config, EMBEDDING)


def save_hugging_face(
    model: PaliGemma | DualEncoder,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes a model as a folder that transformers opens: config, weights, preprocessor and tokenizer.

    Args:
      model: with plain kernels and without adapters; written in its own dtype.
      folder: created if missing; the weights of an earlier save in it are replaced.
      tokenizer: location of the tokenizer's files, which are copied: the folder of the original model, a
        tokenizer.model, or "tiny". None writes none, and transformers then opens the model but no processor.
      max_shard_size: largest size of a weight file in bytes (one larger array is still one file); several files get an
        index.

    Raises:
      UserError: the model has adapters or quantised kernels, or there are no tokenizer files.
    """
    folder = Path(folder).expanduser()
    if isinstance(model, DualEncoder):
        return dual_encoder.save(model, folder, tokenizer, max_shard_size)
    config = model.config
    image_token = config.image_token
    if image_token is None:
        image_token = min(IMAGE_TOKEN, config.decoder.vocab_size)
    save(folder, config, param_tree.flatten(model), image_token, max_shard_size)
    if config.preprocessing is not None:
        processor = {"processor_class": "PaliGemmaProcessor", "image_seq_length": config.vision.num_patches}
        write_preprocessing(folder, config.preprocessing, **processor)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)


def save(
    folder: Path,
    config: PaliGemmaConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    image_token: int,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes only config.json and the weights.

    Args:
      image_token: id of the image placeholder in transformers' input, usually the first after the tokenizer's own.
    """
    arrays = write_rows(rows(config.decoder.post_norms), params, str(folder))
    write_folder(folder, to_hugging_face(config, image_token), arrays, max_shard_size)
