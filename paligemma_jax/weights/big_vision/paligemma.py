"""big_vision's npz checkpoints of PaliGemma: names joined by "/", layers stacked or one by one, bfloat16 as void16.

For SigLIP see dual_encoder.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.gemma import Gemma, GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViT
from paligemma_jax.weights.big_vision import dual_encoder
from paligemma_jax.weights.big_vision.encoder import BLOCK, check_expressible, vision_config, vision_rows
from paligemma_jax.weights.big_vision.npz import Npz, write_npz
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.name_table import Row, count_layers, write_rows
from train_jax.core import param_tree
from train_jax.core.errors import UserError

EMBEDDING = "llm/embedder/input_embedding"


def rows(unrolled_vision: bool = False, post_norms: bool = False, unrolled_decoder: bool = False) -> list[Row]:
    """Returns the name table; the layers of either tower may be stacked (as released) or stored one by one."""
    layers = "llm/layers" + ("/{i}" if unrolled_decoder else "")
    table = [
        *vision_rows(BLOCK + ("_{i}" if unrolled_vision else "")),
        Row("projector/linear/kernel", "img/head/kernel"),
        Row("projector/linear/bias", "img/head/bias"),
        Row("decoder/embed_tokens/embedding", EMBEDDING),
        Row("decoder/norm/scale", "llm/final_norm/scale"),
        Row("decoder/layers/self_attn/q_proj/kernel", f"{layers}/attn/q_einsum/w", "heads_in"),
        Row("decoder/layers/self_attn/k_proj/kernel", f"{layers}/attn/kv_einsum/w", "heads_in", part=0),
        Row("decoder/layers/self_attn/v_proj/kernel", f"{layers}/attn/kv_einsum/w", "heads_in", part=1),
        Row("decoder/layers/self_attn/o_proj/kernel", f"{layers}/attn/attn_vec_einsum/w"),
        Row("decoder/layers/mlp/gate_proj/kernel", f"{layers}/mlp/gating_einsum", part=0),
        Row("decoder/layers/mlp/up_proj/kernel", f"{layers}/mlp/gating_einsum", part=1),
        Row("decoder/layers/mlp/down_proj/kernel", f"{layers}/mlp/linear"),
        Row("decoder/layers/pre_attention_norm/scale", f"{layers}/pre_attention_norm/scale"),
        Row("decoder/layers/pre_ffw_norm/scale", f"{layers}/pre_ffw_norm/scale"),
    ]
    if post_norms:
        norms = ("post_attention_norm", "post_ffw_norm")
        table += [Row(f"decoder/layers/{norm}/scale", f"{layers}/{norm}/scale") for norm in norms]
    return table


class _Layout:
    """How a file stores its layers: stacked under one name, or one array per layer."""

    def __init__(self, arrays: Npz):
        names = arrays.names()
        self.arrays = arrays
        self.vision_depth = count_layers(names, rf"{BLOCK}_{{i}}/LayerNorm_0/scale")  # 0: stacked
        self.decoder_depth = count_layers(names, r"llm/layers/{i}/pre_attention_norm/scale")
        self.post_norms = any(name.startswith("llm/layers/") and "post_attention_norm" in name for name in names)

    def rows(self) -> list[Row]:
        """Returns the file's name table."""
        return rows(bool(self.vision_depth), self.post_norms, bool(self.decoder_depth))

    def decoder_shape(self, leaf: str, rank: int) -> tuple[int, ...]:
        """Returns the shape of one of the decoder's leaves of `rank` axes, with the layer axis in front."""
        if not self.decoder_depth:
            return self.arrays.shape(f"llm/layers/{leaf}", rank + 1)
        return self.decoder_depth, *self.arrays.shape(f"llm/layers/0/{leaf}", rank)


def decoder_config(arrays: Npz, **fields) -> GemmaConfig:
    """Returns the decoder's sizes, from the arrays' shapes.

    Args:
      fields: settings that shapes do not give (soft caps, sliding_window, rope_theta, query_scale). The defaults are
        those of the released PaliGemma 1 or 2 in big_vision: for Gemma 2 a cap of 50 on the attention scores, none on
        the logits, no window.
    """
    layout = _Layout(arrays)
    depth, num_heads, width, head_dim = layout.decoder_shape("attn/q_einsum/w", 3)
    _, _, num_kv_heads, _, _ = layout.decoder_shape("attn/kv_einsum/w", 4)
    _, mlp_dim, _ = layout.decoder_shape("mlp/linear", 2)
    vocab_size, _ = arrays.shape(EMBEDDING, 2)
    released: dict[str, Any] = {"attn_softcap": 50.0} if layout.post_norms else {}
    if (depth, width) == (46, 4608):  # Gemma 2 27B
        released["query_scale"] = (width / num_heads) ** -0.5
    return GemmaConfig(
        vocab_size,
        width,
        depth,
        mlp_dim,
        num_heads,
        num_kv_heads,
        head_dim,
        post_norms=layout.post_norms,
        **released | fields,
    )


def model_config(arrays: Npz, **decoder) -> PaliGemmaConfig:
    """Returns the whole model's config; `decoder`: see `decoder_config`."""
    vision = vision_config(arrays)
    return PaliGemmaConfig(vision, decoder_config(arrays, **decoder), Preprocessing.big_vision(vision.image_size))


# The towers of "file.npz:img": our prefix, a constructor, and prefixes of their arrays that are not part of it.
TOWERS = {
    "img": ("vision/", lambda config: ViT(config.vision, rngs=nnx.Rngs(0)), ("img/head/", "img/MAPHead_0/")),
    "llm": ("decoder/", lambda config: Gemma(config.decoder, rngs=nnx.Rngs(0)), ()),
}


def open_file(file: Path, tower: str = "", **decoder) -> Checkpoint:
    """Opens a big_vision file, or one tower of it.

    Args:
      file: the .npz of a PaliGemma or a SigLIP. The tower "img" of either is read without its head.
      tower: "img", "llm", or empty for the whole model.
      decoder: see `decoder_config`.

    Raises:
      UserError: a file that is broken or of another architecture, or an unknown tower.
    """
    arrays = Npz(file)
    if not tower and dual_encoder.is_dual_encoder(arrays):
        return dual_encoder.open_arrays(arrays)
    if not tower:
        config = model_config(arrays, **decoder)
        return Checkpoint(arrays, arrays.names(), _Layout(arrays).rows(), config, EMBEDDING)
    if tower not in TOWERS:
        raise UserError(f"{file}:{tower} asks for a part {tower!r}, expected one of {', '.join(TOWERS)}: choose one.")
    prefix, build, without = TOWERS[tower]
    names = {name for name in arrays.names() if name.startswith(f"{tower}/") and not name.startswith(without)}
    table = [
        row for row in _Layout(arrays).rows() if row.ours.startswith(prefix) and not row.theirs.startswith(without)
    ]
    table = [dataclasses.replace(row, ours=row.ours.removeprefix(prefix)) for row in table]
    if tower == "img":
        vision = vision_config(arrays)
        config = PaliGemmaConfig(vision, preprocessing=Preprocessing.big_vision(vision.image_size))
        return Checkpoint(arrays, names, table, config, "img/embedding/kernel", build)
    config = PaliGemmaConfig(decoder=decoder_config(arrays, **decoder))
    return Checkpoint(arrays, names, table, config, EMBEDDING, build)


def save_big_vision(model: PaliGemma | DualEncoder, file: str | Path) -> None:
    """Writes a model's parameters as big_vision reads them, under `params/`.

    As in released files, a PaliGemma's layers are stacked and a SigLIP's are stored one by one. Soft caps, image
    resizing and the tokenizer are not in the file but in big_vision's configs; `pg.load` takes the caps as arguments.

    Args:
      model: with plain kernels and without adapters, in any dtype; bfloat16 is written as void16, as numpy does.
      file: ends in .npz; replaced if it exists.

    Raises:
      UserError: the model has adapters or quantised kernels, is a CLIP, or has an activation, eps or pixel range that
        big_vision's models do not have, as the file cannot express it; or the file has another ending.
    """
    file = Path(file).expanduser()
    if file.suffix != ".npz":
        raise UserError(f"{file} does not end in .npz, as big_vision's files do: rename it.")
    if isinstance(model, DualEncoder):
        return dual_encoder.save(model, file)
    config = model.config
    check_expressible(file, config.preprocessing, vision=config.vision, decoder=config.decoder)
    write_npz(file, write_rows(rows(post_norms=config.decoder.post_norms), param_tree.flatten(model), str(file)))
