"""Names and sizes of the encoders in big_vision's files of SigLIP and PaliGemma; layers stacked or one by one."""

from pathlib import Path
from typing import Any

from paligemma_jax.images.image_processor import HALF
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.big_vision.npz import Npz
from paligemma_jax.weights.name_table import Row, count_layers
from train_jax.core.errors import UserError

BLOCK = "img/Transformer/encoderblock"
ATTENTION = "MultiHeadDotProductAttention_0"
ATTENTION_NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
# Released image sizes that the patches do not fill, by patch size and grid: So400m/14 at 384 pixels.
UNFILLED = {(14, 27): 384}


def block_rows(ours: str, theirs: str) -> list[Row]:
    """Returns the rows of one block, or of all stacked ones: our path, and theirs, which may hold `{i}`."""
    table = [
        Row(f"{ours}/{norm}/{leaf}", f"{theirs}/LayerNorm_{i}/{leaf}")
        for i, norm in enumerate(("layer_norm1", "layer_norm2"))
        for leaf in ("scale", "bias")
    ]
    return table + attention_rows(f"{ours}/self_attn", theirs) + mlp_rows(f"{ours}/mlp", theirs)


def attention_rows(ours: str, theirs: str) -> list[Row]:
    """Returns the rows of the attention within a block or a pooling head."""
    return [
        Row(f"{ours}/{module}/{leaf}", f"{theirs}/{ATTENTION}/{name}/{leaf}")
        for module, name in ATTENTION_NAMES.items()
        for leaf in ("kernel", "bias")
    ]


def mlp_rows(ours: str, theirs: str) -> list[Row]:
    """Returns the rows of the MLP within a block or a pooling head."""
    return [
        Row(f"{ours}/{fc}/{leaf}", f"{theirs}/MlpBlock_0/Dense_{i}/{leaf}")
        for i, fc in enumerate(("fc1", "fc2"))
        for leaf in ("kernel", "bias")
    ]


def vision_rows(block: str = BLOCK) -> list[Row]:
    """Returns the rows of the vision tower without head; `block` ends in `_{i}` if blocks are stored one by one."""
    return [
        Row("vision/patch_embedding/kernel", "img/embedding/kernel"),
        Row("vision/patch_embedding/bias", "img/embedding/bias"),
        Row("vision/position_embedding", "img/pos_embedding", "row"),
        Row("vision/post_layernorm/scale", "img/Transformer/encoder_norm/scale"),
        Row("vision/post_layernorm/bias", "img/Transformer/encoder_norm/bias"),
        *block_rows("vision/layers", block),
    ]


def block_names(arrays: Npz, block: str) -> str:
    """Returns the file's name for its blocks: `block` if layers are stacked, else `block_{i}`."""
    return f"{block}_{{i}}" if count_layers(arrays.names(), rf"{block}_{{i}}/LayerNorm_0/scale") else block


def encoder_sizes(arrays: Npz, block: str) -> dict[str, Any]:
    """Returns depth, mlp_dim and num_heads of an encoder, from its arrays' shapes."""
    depth = count_layers(arrays.names(), rf"{block}_{{i}}/LayerNorm_0/scale")

    def shape(leaf: str, rank: int) -> tuple[int, ...]:
        if depth:
            return depth, *arrays.shape(f"{block}_0/{leaf}", rank)
        return arrays.shape(f"{block}/{leaf}", rank + 1)

    layers, heads, _ = shape(f"{ATTENTION}/query/bias", 2)
    return {"depth": layers, "mlp_dim": shape("MlpBlock_0/Dense_0/bias", 1)[1], "num_heads": heads}


def vision_config(arrays: Npz) -> ViTConfig:
    """Returns the vision tower's sizes, from the arrays' shapes; the image size is that which the patches fill."""
    patch, _, _, width = arrays.shape("img/embedding/kernel", 4)
    grid = round(arrays.shape("img/pos_embedding", 2, 3)[-2] ** 0.5)
    return ViTConfig(grid * patch, patch, width, **encoder_sizes(arrays, BLOCK))


def check_expressible(file: Path, images: Preprocessing | None, **towers: ViTConfig | GemmaConfig | TextConfig) -> None:
    """Refuses to write settings that the format cannot express, as readers would assume big_vision's instead.

    Args:
      file: the file to be written.
      images: the model's preprocessing; the reader's family decides the resizing.
      towers: the model's, by name.

    Raises:
      UserError: an activation, eps or pixel range that big_vision's models do not have.
    """
    for name, tower in towers.items():
        for field in ("activation", "eps"):
            value, theirs = getattr(tower, field), getattr(type(tower), field)
            if value != theirs:
                raise _inexpressible(file, f"{name}.{field} = {value}", theirs)
    if images is not None and (images.mean, images.std) != (HALF, HALF):
        raise _inexpressible(file, f"images of mean {images.mean} and deviation {images.std}", "0.5 and 0.5")


def _inexpressible(file: Path, setting: str, theirs: object) -> UserError:
    return UserError(
        f"{file} cannot say that the model has {setting}, where big_vision's have {theirs}: save it for transformers, "
        "or with save_orbax."
    )
