"""PaliGemma as transformers saves it: config.json and array names, in both directions."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.folder import Folder, read_json
from paligemma_jax.weights.tables import Row, read_rows, write_rows
from train_jax.errors import UserError

SIZES = ("num_hidden_layers", "intermediate_size", "num_attention_heads")
VISION = "vision_tower.vision_model.encoder.layers.{i}."
EMBEDDING = "language_model.model.embed_tokens.weight"
DECODER = "language_model.model.layers.{i}."


def rows(post_norms: bool = False) -> list[Row]:
    """The name table of PaliGemma."""
    tower = "vision_tower.vision_model."
    table = [
        Row("vision/patch_embedding/kernel", f"{tower}embeddings.patch_embedding.weight", "conv"),
        Row("vision/patch_embedding/bias", f"{tower}embeddings.patch_embedding.bias"),
        Row("vision/position_embedding", f"{tower}embeddings.position_embedding.weight"),
        Row("vision/post_layernorm/scale", f"{tower}post_layernorm.weight"),
        Row("vision/post_layernorm/bias", f"{tower}post_layernorm.bias"),
        Row("projector/linear/kernel", "multi_modal_projector.linear.weight", "linear"),
        Row("projector/linear/bias", "multi_modal_projector.linear.bias"),
        Row("decoder/embed_tokens/embedding", EMBEDDING),
        Row("decoder/norm/scale", "language_model.model.norm.weight"),
    ]
    for norm in ("layer_norm1", "layer_norm2"):
        table += [
            Row(f"vision/layers/{norm}/scale", f"{VISION}{norm}.weight"),
            Row(f"vision/layers/{norm}/bias", f"{VISION}{norm}.bias"),
        ]
    for module, contracted in (
        ("self_attn/q_proj", 1),
        ("self_attn/k_proj", 1),
        ("self_attn/v_proj", 1),
        ("self_attn/out_proj", 2),
        ("mlp/fc1", 1),
        ("mlp/fc2", 1),
    ):
        name = VISION + module.replace("/", ".")
        table += [
            Row(f"vision/layers/{module}/kernel", f"{name}.weight", "linear", contracted),
            Row(f"vision/layers/{module}/bias", f"{name}.bias", "flat"),
        ]
    for module, contracted in (
        ("self_attn/q_proj", 1),
        ("self_attn/k_proj", 1),
        ("self_attn/v_proj", 1),
        ("self_attn/o_proj", 2),
        ("mlp/gate_proj", 1),
        ("mlp/up_proj", 1),
        ("mlp/down_proj", 1),
    ):
        name = DECODER + module.replace("/", ".")
        table.append(Row(f"decoder/layers/{module}/kernel", f"{name}.weight", "linear", contracted))
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if post_norms:
        norms = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    return table + [Row(f"decoder/layers/{a}/scale", f"{DECODER}{b}.weight") for a, b in norms.items()]


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
      UserError: it is missing or broken, of another architecture, or lacks a size that the arrays do not tell.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("model_type") != "paligemma":
        raise UserError(
            f"{file} describes a {config.get('model_type')!r} model, expected 'paligemma': give another folder."
        )
    needed = {
        "text_config": ("model_type", *SIZES, "num_key_value_heads"),
        "vision_config": SIZES,
    }
    for section, keys in needed.items():
        missing = [key for key in keys if key not in config.get(section, {})]
        if missing:
            raise UserError(f"{file} lacks {section}.{missing[0]}: add it, as newer transformers write it.")
    return config


def model_config(config: dict, arrays: Folder, preprocessing: Preprocessing | None = None) -> PaliGemmaConfig:
    """Our config from theirs; what old config files leave out is read from the arrays or is the released models'."""
    text, vision = config["text_config"], config["vision_config"]
    positions, width = arrays.shape("vision_tower.vision_model.embeddings.position_embedding.weight", 2)
    vocab, hidden = arrays.shape(EMBEDDING, 2)
    _, _, patch, _ = arrays.shape("vision_tower.vision_model.embeddings.patch_embedding.weight", 4)
    image_size = round(positions**0.5) * patch
    gemma2 = text["model_type"] == "gemma2"
    head_dim = text.get("head_dim", 256)
    rope = text.get("rope_parameters") or text
    query_scale = text.get("query_pre_attn_scalar", head_dim) ** -0.5 if gemma2 else None
    return PaliGemmaConfig(
        vision=ViTConfig(
            image_size=image_size,
            patch_size=patch,
            width=width,
            depth=vision["num_hidden_layers"],
            mlp_dim=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            eps=vision.get("layer_norm_eps", 1e-6),
        ),
        decoder=GemmaConfig(
            vocab_size=vocab,
            width=hidden,
            depth=text["num_hidden_layers"],
            mlp_dim=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=head_dim,
            eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10_000.0),
            query_scale=query_scale,
            attn_softcap=text.get("attn_logit_softcapping", 50.0) if gemma2 else None,
            final_softcap=text.get("final_logit_softcapping", 30.0) if gemma2 else None,
            post_norms=gemma2,
        ),
        preprocessing=preprocessing or Preprocessing.siglip(image_size),
    )


def read(arrays: Folder, config: PaliGemmaConfig, shapes: dict, dtype) -> dict[str, np.ndarray]:
    """All parameters of a folder, cast to `dtype`; the tied output table may be stored a second time."""
    names = arrays.names()
    if "lm_head.weight" in names and not np.array_equal(arrays["lm_head.weight"], arrays[EMBEDDING]):
        raise UserError(
            f"{arrays.path}: lm_head.weight differs from {EMBEDDING}, expected the tied table: train it tied."
        )
    names = names - {"lm_head.weight"}
    return read_rows(rows(config.decoder.post_norms), names, arrays.__getitem__, shapes, dtype, source=str(arrays.path))


def save(folder: Path, config: PaliGemmaConfig, params: dict[str, np.ndarray], image_token: int) -> None:
    """Writes config.json and model.safetensors so that transformers opens the folder (PaliGemma 1).

    Args:
      image_token: id that stands for a patch in transformers' input, usually the first after the tokenizer's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = write_rows(rows(config.decoder.post_norms), params)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_to_hugging_face(config, image_token), indent=2) + "\n")


def _to_hugging_face(config: PaliGemmaConfig, image_token: int) -> dict:
    vision, text = config.vision, config.decoder
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": text.width,
        "projection_dim": text.width,
        "image_token_index": image_token,
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.eps,
            "rope_theta": text.rope_theta,
            "hidden_act": "gelu_pytorch_tanh",
            "num_image_tokens": vision.num_patches,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "layer_norm_eps": vision.eps,
            "hidden_act": "gelu_pytorch_tanh",
            "projection_dim": text.width,
            "vision_use_head": False,
        },
    }
