"""config.json of SigLIP and CLIP as transformers writes it, read and written."""

from pathlib import Path
from typing import Any

from paligemma_jax.files.side_files import account, read_json, refusal
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.config_values import Values, theirs, tower_fields, vision_config
from paligemma_jax.weights.hugging_face.folder import Folder
from paligemma_jax.weights.hugging_face.transformers_keys import DUAL
from train_jax.core.errors import UserError

FAMILIES = tuple(DUAL)
NAFLEX = "siglip2"  # SigLIP 2 for images of any shape; a SigLIP 2 of one resolution has model_type "siglip"
TOWERS = ("vision_config", "text_config")
EMBEDDING = "text_model.embeddings.token_embedding.weight"
VISION, TEXT = "vision_model.", "text_model."
LEGACY_EOS = 2  # an eos_token_id that means "the largest id" in CLIP's first configs
# transformers' defaults for missing keys: released SigLIPs list little more than their differences from B/16.
_SIZES = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP = _SIZES | {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
_CLIP = _SIZES | {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "siglip": {"vision_config": _SIGLIP | {"image_size": 224}, "text_config": _SIGLIP},
    "clip": {
        "vision_config": _CLIP | {"image_size": 224},
        "text_config": _CLIP | {"intermediate_size": 2048, "num_attention_heads": 8, "eos_token_id": 49_407},
    },
}
# Sizes of CLIP that transformers assumes if the older spelling of a tower's config leaves them out.
_CLIP_SIZES = {
    "vision_config": {"hidden_size": 768, "patch_size": 32},
    "text_config": {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49_408},
}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the folder's config.json with transformers' defaults; every key of it is accounted for.

    Raises:
      UserError: it is missing or broken, of another architecture, or has a value that is not supported.
    """
    file = folder / "config.json"
    config = read_json(file)
    family = config.get("model_type")
    if family == NAFLEX:
        raise UserError(
            f"{file} describes a NaFlex SigLIP 2, expected one of fixed resolution: give one such as "
            "google/siglip2-base-patch16-224."
        )
    if family not in FAMILIES:
        raise UserError(f"{file} describes a {family!r} model, expected one of {', '.join(FAMILIES)}: give another.")
    account(config, DUAL[family][""], file)
    for tower in TOWERS:
        stored = config.get(tower) or {}
        older = config.get(f"{tower}_dict")  # of CLIP's first configs; it takes precedence, with its defaults too
        for name, value in ((tower, stored), (f"{tower}_dict", older or {})):
            if not isinstance(value, dict):
                raise refusal(file, name, value, "an object of keys", "download it again")
        if isinstance(older, dict):
            stored = stored | DEFAULTS[family][tower] | _CLIP_SIZES[tower] | older
        account(stored, DUAL[family][tower], file, f"{tower}.")
        config[tower] = DEFAULTS[family][tower] | stored
    return config


def model_config(config: dict[str, Any], arrays: Folder) -> DualEncoderConfig:
    """Returns our config from theirs; width, vocabulary size and text length come from the arrays.

    Raises:
      UserError: values that are invalid, not supported, or contradict the arrays.
    """
    family, file = config["model_type"], arrays.path / "config.json"
    clip, defaults = family == "clip", DEFAULTS[family]
    vision, text = (Values(config[tower], file, f"{tower}.") for tower in TOWERS)
    vocab_size, text_width = arrays.shape(EMBEDDING, 2)
    length, _ = arrays.shape(f"{TEXT}embeddings.position_embedding.weight", 2)
    projection = "text_projection.weight" if clip else f"{TEXT}head.weight"
    embed_dim, _ = arrays.shape(projection, 2)
    for values, key, size, what in (
        (text, "vocab_size", vocab_size, EMBEDDING),
        (text, "hidden_size", text_width, EMBEDDING),
        (text, "max_position_embeddings", length, "the table of positions"),
        (
            Values(config, file) if clip else text,
            "projection_dim" if clip else "projection_size",
            embed_dim,
            projection,
        ),
    ):
        values.check_size(key, size, what)
    tower = vision_config(vision, arrays, VISION, defaults["vision_config"], class_token=clip)
    default = Preprocessing.clip if clip else Preprocessing.siglip
    pooling: dict[str, Any] = dict(causal=True, pool="eos", eos_token=_eos(text, vocab_size)) if clip else {}
    return DualEncoderConfig(
        vision=tower,
        text=TextConfig(vocab_size, length, text_width, **tower_fields(text, defaults["text_config"]), **pooling),
        embed_dim=embed_dim,
        pool="class" if clip else "map",
        image_projection=clip,
        projection_bias=not clip,
        initial_bias=None if clip else -10.0,
        preprocessing=default(tower.image_size),
    )


def _eos(text: Values, vocab_size: int) -> int | None:
    """Returns the id of the token that CLIP pools at; None for the largest id."""
    eos = text.get("eos_token_id", DEFAULTS["clip"]["text_config"]["eos_token_id"])
    if type(eos) is not int or not 0 <= eos < vocab_size:
        raise text.refuse("eos_token_id", f"one id below the {vocab_size} of the vocabulary", "correct config.json")
    return None if eos == LEGACY_EOS else eos


def to_hugging_face(config: DualEncoderConfig) -> dict[str, Any]:
    """Returns our config as config.json; `model_config` is its inverse.

    Raises:
      UserError: a model that is neither a SigLIP nor a CLIP as transformers has them.
    """
    vision, text = config.vision, config.text
    clip = vision.class_token
    siglip = (config.pool, text.pool, text.causal) == ("map", "last", False) and config.initial_bias is not None
    clip_parts = (text.causal, text.pool == "eos", config.image_projection, not config.projection_bias)
    if set(clip_parts) != {clip} or siglip == clip:
        raise UserError(
            "the model is neither a SigLIP nor a CLIP as transformers has them (pooling, projections, bias): save it "
            "for big_vision, or with save_orbax."
        )
    eos = LEGACY_EOS if text.eos_token is None else text.eos_token
    if clip:
        tokens = dict(bos_token_id=eos - 1, eos_token_id=eos, pad_token_id=eos)
    else:
        tokens = dict(bos_token_id=None, eos_token_id=1, pad_token_id=1)
    projection = {"projection_dim" if clip else "projection_size": config.embed_dim}
    name = "clip" if clip else "siglip"
    return {
        "architectures": ["CLIPModel" if clip else "SiglipModel"],
        "model_type": name,
        **(dict(projection_dim=config.embed_dim, logit_scale_init_value=config.initial_scale) if clip else {}),
        "text_config": {
            "model_type": f"{name}_text_model",
            **_sizes(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.length,
            **projection,
            **tokens,
        },
        "vision_config": {
            "model_type": f"{name}_vision_model",
            **_sizes(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            **(projection if clip else {"vision_use_head": True}),
        },
    }


def _sizes(tower: ViTConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "layer_norm_eps": tower.eps,
        "hidden_act": theirs(tower.activation),
    }
