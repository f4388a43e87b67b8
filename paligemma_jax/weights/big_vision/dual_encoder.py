"""big_vision's npz checkpoints of SigLIP: two towers, with layers stored one by one (as released) or stacked."""

import dataclasses
from pathlib import Path

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.weights.big_vision.encoder import (
    BLOCK,
    UNFILLED,
    attention_rows,
    block_names,
    block_rows,
    check_expressible,
    encoder_sizes,
    mlp_rows,
    vision_config,
    vision_rows,
)
from paligemma_jax.weights.big_vision.npz import Npz, write_npz
from paligemma_jax.weights.checkpoint import Checkpoint, whole_model
from paligemma_jax.weights.name_table import Row, write_rows
from train_jax.core import param_tree
from train_jax.core.errors import UserError

EMBEDDING = "txt/Embed_0/embedding"
TEXT_BLOCK = "txt/Encoder_0/encoderblock"
HEAD = "img/MAPHead_0"


def rows(config: DualEncoderConfig, vision_block: str, text_block: str) -> list[Row]:
    """Returns the name table; the names of blocks end in `_{i}` if these are stored one by one."""
    table = vision_rows(vision_block) + [
        Row("text/token_embedding/embedding", EMBEDDING),
        Row("text/position_embedding", "txt/pos_embedding", "row"),
        Row("text/final_layer_norm/scale", "txt/Encoder_0/encoder_norm/scale"),
        Row("text/final_layer_norm/bias", "txt/Encoder_0/encoder_norm/bias"),
        *block_rows("text/layers", text_block),
        Row("text_projection/kernel", "txt/head/kernel"),
        Row("text_projection/bias", "txt/head/bias"),
        Row("logit_scale", "t", "row"),
    ]
    if config.initial_bias is not None:
        table.append(Row("logit_bias", "b", "row"))
    if config.pool == "map":
        table += [
            Row("image_head/probe", f"{HEAD}/probe", "token"),
            Row("image_head/layernorm/scale", f"{HEAD}/LayerNorm_0/scale"),
            Row("image_head/layernorm/bias", f"{HEAD}/LayerNorm_0/bias"),
            *attention_rows("image_head/attention", HEAD),
            *mlp_rows("image_head/mlp", HEAD),
        ]
    if config.image_projection:
        table += [Row(f"image_projection/{leaf}", f"img/head/{leaf}") for leaf in ("kernel", "bias")]
    return table


def is_dual_encoder(arrays: Npz) -> bool:
    """Returns whether a file has a text tower."""
    return EMBEDDING in arrays.names()


def model_config(arrays: Npz) -> DualEncoderConfig:
    """Returns the sizes, from the arrays' shapes. Without an attention head, images are pooled by their mean."""
    names, vision = arrays.names(), vision_config(arrays)
    image_size = UNFILLED.get((vision.patch_size, vision.grid), vision.image_size)
    vocab_size, width = arrays.shape(EMBEDDING, 2)
    length = arrays.shape("txt/pos_embedding", 2, 3)[-2]
    return DualEncoderConfig(
        vision=dataclasses.replace(vision, image_size=image_size),
        text=TextConfig(vocab_size, length, width, **encoder_sizes(arrays, TEXT_BLOCK)),
        embed_dim=arrays.shape("txt/head/kernel", 2)[1],
        pool="map" if f"{HEAD}/probe" in names else "gap",
        image_projection="img/head/kernel" in names,
        initial_bias=-10.0 if "b" in names else None,
        preprocessing=Preprocessing.big_vision(image_size),
    )


def open_arrays(arrays: Npz) -> Checkpoint:
    """Opens the whole of a SigLIP file.

    Raises:
      UserError: it is broken, or its towers do not match.
    """
    try:
        config = model_config(arrays)
    except ValueError as error:
        raise UserError(f"{arrays.path} is no SigLIP that this package knows: {error}") from None
    table = rows(config, block_names(arrays, BLOCK), block_names(arrays, TEXT_BLOCK))
    return Checkpoint(arrays, arrays.names(), table, config, "img/embedding/kernel", whole_model)


def save(model: DualEncoder, file: Path) -> None:
    """Writes a SigLIP as released, one array per layer.

    Raises:
      UserError: a CLIP, which big_vision's format cannot hold, adapters or quantised kernels.
    """
    config = model.config
    if config.vision.class_token or config.text.causal or not config.projection_bias:
        raise UserError(f"{file} cannot hold a CLIP, big_vision's format has SigLIP alone: save it for transformers.")
    check_expressible(file, config.preprocessing, vision=config.vision, text=config.text)
    table = rows(config, f"{BLOCK}_{{i}}", f"{TEXT_BLOCK}_{{i}}")
    write_npz(file, write_rows(table, param_tree.flatten(model), str(file)))
