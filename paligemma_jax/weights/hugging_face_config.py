"""config.json of PaliGemma 1 and 2 as transformers writes it, in both directions."""

from pathlib import Path
from typing import Any

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.folder import Folder, read_json
from paligemma_jax.weights.hugging_face_names import EMBEDDING, TOWER
from train_jax.errors import UserError

SIZES = ("num_hidden_layers", "intermediate_size", "num_attention_heads")
SLIDING, FULL = "sliding_attention", "full_attention"


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
        values = config.get(section, {})
        missing = [key for key in keys if not isinstance(values, dict) or key not in values]
        if missing:
            raise UserError(f"{file} lacks {section}.{missing[0]}: add it, as newer transformers write it.")
        wrong = [key for key in keys if key != "model_type" and not (type(values[key]) is int and values[key] > 0)]
        if wrong:
            raise UserError(
                f"{file} has {section}.{wrong[0]} = {values[wrong[0]]!r}, expected a positive number: mend it."
            )
    text = config["text_config"]
    if text["model_type"] not in ("gemma", "gemma2"):
        raise UserError(
            f"{file} has a text model {text['model_type']!r}, expected 'gemma' or 'gemma2': give another folder."
        )
    layers = text.get("layer_types")
    if text["model_type"] == "gemma2" and layers and layers not in (_layer_types(len(layers)), [FULL] * len(layers)):
        raise UserError(
            f"{file} has layer_types {layers}, expected {SLIDING} and {FULL} in turn as in Gemma 2: give another model."
        )
    return config


def model_config(config: dict, arrays: Folder, preprocessing: Preprocessing | None = None) -> PaliGemmaConfig:
    """Our config from theirs; what old config files leave out is read from the arrays or is the released models'."""
    text, vision = config["text_config"], config["vision_config"]
    positions, width = arrays.shape(f"{TOWER}embeddings.position_embedding.weight", 2)
    vocab, hidden = arrays.shape(EMBEDDING, 2)
    _, _, patch, _ = arrays.shape(f"{TOWER}embeddings.patch_embedding.weight", 4)
    image_size = round(positions**0.5) * patch
    gemma2 = text["model_type"] == "gemma2"
    windowed = gemma2 and set(text.get("layer_types") or ()) != {FULL}
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
            attn_softcap=(text.get("attn_logit_softcapping", 50.0) or None) if gemma2 else None,
            final_softcap=(text.get("final_logit_softcapping", 30.0) or None) if gemma2 else None,
            sliding_window=(text.get("sliding_window", 4096) or None) if windowed else None,
            post_norms=gemma2,
        ),
        preprocessing=preprocessing or Preprocessing.siglip(image_size),
        image_token=config.get("image_token_index", config.get("image_token_id")),
    )


def _layer_types(depth: int) -> list[str]:
    """Gemma 2's."""
    return [(SLIDING, FULL)[i % 2] for i in range(depth)]


def to_hugging_face(config: PaliGemmaConfig, image_token: int) -> dict[str, Any]:
    """Our config as config.json has it; `model_config` is its inverse.

    Args:
      config: of a model of ours.
      image_token: id that stands for a patch in transformers' input.
    """
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
            "model_type": "gemma2" if text.post_norms else "gemma",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.eps,
            "rope_theta": text.rope_theta,
            **(_gemma_2(text) if text.post_norms else {"hidden_act": "gelu_pytorch_tanh"}),
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


def _gemma_2(text: GemmaConfig) -> dict[str, Any]:
    """What Gemma 2's config has in place of Gemma's."""
    scalar = (text.query_scale or text.head_dim**-0.5) ** -2
    whole = [FULL] * text.depth
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": text.attn_softcap,
        "final_logit_softcapping": text.final_softcap,
        "sliding_window": text.sliding_window or 1 << 20,  # the latter for readers that do not know layer_types
        "layer_types": _layer_types(text.depth) if text.sliding_window else whole,
    }
