"""SigLIP (1, and 2 at a fixed resolution) and CLIP as transformers saves them: folders read and written."""

from pathlib import Path
from typing import Any

from paligemma_jax.files.side_files import read_json
from paligemma_jax.images.image_processor import CLIP, SIGLIP
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.weights.checkpoint import Checkpoint, whole_model
from paligemma_jax.weights.hugging_face.dual_encoder_config import (
    EMBEDDING,
    FAMILIES,
    NAFLEX,
    TEXT,
    VISION,
    model_config,
    read_config,
    to_hugging_face,
)
from paligemma_jax.weights.hugging_face.folder import Folder
from paligemma_jax.weights.hugging_face.folder_write import SHARD_SIZE, write_folder
from paligemma_jax.weights.hugging_face.paligemma_names import encoder_rows
from paligemma_jax.weights.hugging_face.processor import read_preprocessing, write_preprocessing
from paligemma_jax.weights.name_table import Row, write_rows
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax.core import param_tree

HEAD = f"{VISION}head."
# Constants 0, 1, 2, ... that older releases of transformers saved with the weights.
COUNTERS = {f"{tower}embeddings.position_ids" for tower in (VISION, TEXT)}


def rows(config: DualEncoderConfig) -> list[Row]:
    """Returns the name table of a SigLIP or CLIP."""
    table = [
        Row("vision/patch_embedding/kernel", f"{VISION}embeddings.patch_embedding.weight", "conv"),
        Row("vision/position_embedding", f"{VISION}embeddings.position_embedding.weight"),
        *encoder_rows("vision", VISION),
        *_norm("vision/post_layernorm", f"{VISION}post_layernorm"),
        Row("text/token_embedding/embedding", EMBEDDING),
        Row("text/position_embedding", f"{TEXT}embeddings.position_embedding.weight"),
        *encoder_rows("text", TEXT),
        *_norm("text/final_layer_norm", f"{TEXT}final_layer_norm"),
    ]
    return table + (_clip_rows() if config.vision.class_token else _siglip_rows())


def _clip_rows() -> list[Row]:
    return [
        Row("vision/class_embedding", f"{VISION}embeddings.class_embedding"),
        *_norm("vision/pre_layernorm", f"{VISION}pre_layrnorm"),  # their spelling
        Row("image_projection/kernel", "visual_projection.weight", "linear"),
        Row("text_projection/kernel", "text_projection.weight", "linear"),
        Row("logit_scale", "logit_scale"),
    ]


def _siglip_rows() -> list[Row]:
    table = [
        Row("vision/patch_embedding/bias", f"{VISION}embeddings.patch_embedding.bias"),
        Row("image_head/probe", f"{HEAD}probe", "token"),
        *_norm("image_head/layernorm", f"{HEAD}layernorm"),
        Row("image_head/attention/out_proj/kernel", f"{HEAD}attention.out_proj.weight", "linear", 2),
        Row("image_head/attention/out_proj/bias", f"{HEAD}attention.out_proj.bias"),
        Row("text_projection/kernel", f"{TEXT}head.weight", "linear"),
        Row("text_projection/bias", f"{TEXT}head.bias"),
        Row("logit_scale", "logit_scale", "row"),
        Row("logit_bias", "logit_bias", "row"),
    ]
    for part, module in enumerate(("q_proj", "k_proj", "v_proj")):
        joined: dict[str, Any] = dict(part=part, parts=3, packed=True)
        name = f"image_head/attention/{module}"
        table.append(Row(f"{name}/kernel", f"{HEAD}attention.in_proj_weight", "linear", **joined))
        table.append(Row(f"{name}/bias", f"{HEAD}attention.in_proj_bias", "flat", **joined))
    for fc in ("fc1", "fc2"):
        table.append(Row(f"image_head/mlp/{fc}/kernel", f"{HEAD}mlp.{fc}.weight", "linear"))
        table.append(Row(f"image_head/mlp/{fc}/bias", f"{HEAD}mlp.{fc}.bias"))
    return table


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def is_dual_encoder(folder: Path) -> bool:
    """Returns whether config.json is a SigLIP's or a CLIP's, or a NaFlex one's, which `open_folder` refuses."""
    file = folder / "config.json"
    return file.exists() and read_json(file).get("model_type") in (*FAMILIES, NAFLEX)


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder of a whole SigLIP or CLIP.

    Raises:
      UserError: files that are missing or broken, or an architecture that transformers' SigLIP and CLIP do not have.
    """
    values = read_config(folder)  # first, so that a NaFlex model is reported as such, whatever else the folder holds
    arrays = Folder(folder)
    config = model_config(values, arrays)
    family = CLIP if config.vision.class_token else SIGLIP
    preprocessing = read_preprocessing(folder, family, config.vision)
    config = config.replace(preprocessing=preprocessing or config.preprocessing)
    return Checkpoint(arrays, arrays.names() - COUNTERS, rows(config), config, EMBEDDING, whole_model)


def save(
    model: DualEncoder, folder: Path, tokenizer: str | Path | None = None, max_shard_size: int = SHARD_SIZE
) -> None:
    """Writes a SigLIP or CLIP folder; arguments and errors: see weights.save_hugging_face.

    Raises:
      UserError: a model that transformers' classes do not have, such as one whose images are pooled by their mean.
    """
    config = to_hugging_face(model.config)
    write_folder(folder, config, write_rows(rows(model.config), param_tree.flatten(model), str(folder)), max_shard_size)
    if model.config.preprocessing is not None:
        processor = "CLIPProcessor" if config["model_type"] == "clip" else "SiglipProcessor"
        write_preprocessing(folder, model.config.preprocessing, processor_class=processor)
    if tokenizer is not None:
        copy_text_tokenizer(tokenizer, folder, model.config.text.length)
