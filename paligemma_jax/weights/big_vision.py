"""big_vision's npz checkpoints of PaliGemma: names joined by "/", layers stacked or one by one, bfloat16 as void16."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.tables import Row, count_layers, read_rows
from train_jax.errors import UserError

BLOCK = "img/Transformer/encoderblock"
ATTENTION = "MultiHeadDotProductAttention_0"


def rows(unrolled_vision: bool = False, post_norms: bool = False) -> list[Row]:
    """The name table; the vision tower's blocks may be stacked (as released) or stored one by one."""
    block = BLOCK + ("_{i}" if unrolled_vision else "")
    table = [
        Row("vision/patch_embedding/kernel", "img/embedding/kernel"),
        Row("vision/patch_embedding/bias", "img/embedding/bias"),
        Row("vision/position_embedding", "img/pos_embedding"),
        Row("vision/post_layernorm/scale", "img/Transformer/encoder_norm/scale"),
        Row("vision/post_layernorm/bias", "img/Transformer/encoder_norm/bias"),
        Row("projector/linear/kernel", "img/head/kernel"),
        Row("projector/linear/bias", "img/head/bias"),
        Row("decoder/embed_tokens/embedding", "llm/embedder/input_embedding"),
        Row("decoder/norm/scale", "llm/final_norm/scale"),
        Row("decoder/layers/self_attn/q_proj/kernel", "llm/layers/attn/q_einsum/w", "heads_in"),
        Row("decoder/layers/self_attn/k_proj/kernel", "llm/layers/attn/kv_einsum/w", "heads_in", part=0),
        Row("decoder/layers/self_attn/v_proj/kernel", "llm/layers/attn/kv_einsum/w", "heads_in", part=1),
        Row("decoder/layers/self_attn/o_proj/kernel", "llm/layers/attn/attn_vec_einsum/w"),
        Row("decoder/layers/mlp/gate_proj/kernel", "llm/layers/mlp/gating_einsum", part=0),
        Row("decoder/layers/mlp/up_proj/kernel", "llm/layers/mlp/gating_einsum", part=1),
        Row("decoder/layers/mlp/down_proj/kernel", "llm/layers/mlp/linear"),
        Row("decoder/layers/pre_attention_norm/scale", "llm/layers/pre_attention_norm/scale"),
        Row("decoder/layers/pre_ffw_norm/scale", "llm/layers/pre_ffw_norm/scale"),
    ]
    for i, norm in enumerate(("layer_norm1", "layer_norm2")):
        for leaf in ("scale", "bias"):
            table.append(Row(f"vision/layers/{norm}/{leaf}", f"{block}/LayerNorm_{i}/{leaf}"))
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for leaf in ("kernel", "bias"):
        for ours, theirs in names.items():
            table.append(Row(f"vision/layers/self_attn/{ours}/{leaf}", f"{block}/{ATTENTION}/{theirs}/{leaf}"))
        for i, fc in enumerate(("fc1", "fc2")):
            table.append(Row(f"vision/layers/mlp/{fc}/{leaf}", f"{block}/MlpBlock_0/Dense_{i}/{leaf}"))
    if post_norms:
        for norm in ("post_attention_norm", "post_ffw_norm"):
            table.append(Row(f"decoder/layers/{norm}/scale", f"llm/layers/{norm}/scale"))
    return table


class Npz:
    """Lazy access to an npz file's arrays, with or without the `params/` prefix; never unpickles."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = np.load(path, allow_pickle=False)
            if not isinstance(self._file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            keys = list(self._file.keys())
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read as npz ({error}): download it again.") from None
        prefixed = [key for key in keys if key.startswith("params/")]
        self._where = {key.removeprefix("params/"): key for key in (prefixed or keys)}

    def names(self) -> set[str]:
        return set(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            array = self._file[self._where[name]]
        except KeyError:
            raise UserError(
                f"{self.path} has no array {name}: it is not a PaliGemma checkpoint of big_vision."
            ) from None
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{self.path}: the array {name} cannot be read ({error}).") from None
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def model_config(arrays: Npz, **decoder) -> PaliGemmaConfig:
    """Every size from the arrays' shapes.

    Args:
      decoder: fields of GemmaConfig that shapes cannot tell (soft caps, rope_theta, query_scale), the released
        models' values where not given.
    """
    names = arrays.names()
    depth = count_layers(names, rf"{BLOCK}_{{i}}/LayerNorm_0/scale")
    block = f"{BLOCK}_0" if depth else BLOCK
    scale = arrays[f"{block}/LayerNorm_0/scale"]
    depth = depth or scale.shape[0]
    heads, _ = arrays[f"{block}/{ATTENTION}/query/bias"].shape[-2:]
    patch, _, _, width = arrays["img/embedding/kernel"].shape
    grid = round(arrays["img/pos_embedding"].shape[-2] ** 0.5)
    layers, num_heads, hidden, head_dim = arrays["llm/layers/attn/q_einsum/w"].shape
    return PaliGemmaConfig(
        vision=ViTConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            mlp_dim=arrays[f"{block}/MlpBlock_0/Dense_0/bias"].shape[-1],
            num_heads=heads,
        ),
        decoder=GemmaConfig(
            vocab_size=arrays["llm/embedder/input_embedding"].shape[0],
            width=hidden,
            depth=layers,
            mlp_dim=arrays["llm/layers/mlp/linear"].shape[-2],
            num_heads=num_heads,
            num_kv_heads=arrays["llm/layers/attn/kv_einsum/w"].shape[2],
            head_dim=head_dim,
            post_norms="llm/layers/post_attention_norm/scale" in names,
            **decoder,
        ),
        preprocessing=Preprocessing.big_vision(grid * patch),
    )


def read(arrays: Npz, config: PaliGemmaConfig, shapes: dict, dtype) -> dict[str, np.ndarray]:
    """All parameters of a file, cast to `dtype`."""
    names = arrays.names()
    table = rows(f"{BLOCK}_0/LayerNorm_0/scale" in names, config.decoder.post_norms)
    return read_rows(table, names, arrays.__getitem__, shapes, dtype, source=str(arrays.path), scanned=True)
