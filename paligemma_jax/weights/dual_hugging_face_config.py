"""config.json of SigLIP and CLIP as transformers writes it, in both directions."""

from pathlib import Path
from typing import Any

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.folder import Folder, read_json
from train_jax.errors import UserError

FAMILIES = ("siglip", "clip")
NAFLEX = "siglip2"  # SigLIP 2 of any shape of image; of one resolution it is a "siglip"
TOWERS = ("vision_config", "text_config")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}
WORDS = "text_model.embeddings.token_embedding.weight"
VISION, TEXT = "vision_model.", "text_model."
LEGACY_EOS = 2  # an eos_token_id that stands for "the largest id" in CLIP's first configs
# What a config leaves out is transformers' default: released SigLIPs name hardly more than what differs from B/16.
_SIZES = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DEFAULTS = {
    "siglip": dict.fromkeys(TOWERS, _SIZES | {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}),
    "clip": {
        "vision_config": _SIZES | {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        "text_config": _SIZES
        | {
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
            "eos_token_id": 49_407,
        },
    },
}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json with transformers' defaults filled in.

    Raises:
      UserError: it is missing or broken, of another architecture, or a size or activation that there is not.
    """
    file = folder / "config.json"
    config = read_json(file)
    family = config.get("model_type")
    if family == NAFLEX:
        raise UserError(f"{file} describes a NaFlex SigLIP 2, expected one of a fixed resolution: give such a one.")
    if family not in FAMILIES:
        raise UserError(f"{file} describes a {family!r} model, expected one of {', '.join(FAMILIES)}: give another.")
    for tower in TOWERS:
        stored = config.get(tower) or {}
        older = config.get(f"{tower}_dict") or {}  # in CLIP's first configs; it wins
        if not isinstance(stored, dict) or not isinstance(older, dict):
            raise UserError(f"{file} has no object at {tower}: download it again.")
        config[tower] = values = DEFAULTS[family][tower] | stored | older
        wrong = [key for key in _SIZES if not (type(values[key]) is int and values[key] > 0)]
        if wrong:
            raise UserError(
                f"{file} has {tower}.{wrong[0]} = {values[wrong[0]]!r}, expected a positive number: mend it."
            )
        if values["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"{file} has {tower}.hidden_act = {values['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}: "
                "give another model."
            )
    return config


def model_config(config: dict[str, Any], arrays: Folder, preprocessing: Preprocessing | None) -> DualEncoderConfig:
    """Our config from theirs; widths, words and positions are the arrays'.

    Raises:
      UserError: positions that do not fit the image size, or arrays that are missing.
    """
    clip = config["model_type"] == "clip"
    vision, text = (config[tower] for tower in TOWERS)
    _, _, patch, _ = arrays.shape(f"{VISION}embeddings.patch_embedding.weight", 4)
    positions, vision_width = arrays.shape(f"{VISION}embeddings.position_embedding.weight", 2)
    grid = round((positions - clip) ** 0.5)
    image_size = vision.get("image_size", 224)
    if type(image_size) is not int or image_size // patch != grid:
        raise UserError(
            f"{arrays.path} has {positions} positions for an image_size of {image_size!r} in patches of {patch}, "
            f"expected {grid * patch}: correct config.json."
        )
    vocab_size, text_width = arrays.shape(WORDS, 2)
    length, _ = arrays.shape(f"{TEXT}embeddings.position_embedding.weight", 2)
    eos = text.get("eos_token_id")
    projection = "text_projection.weight" if clip else f"{TEXT}head.weight"
    default = Preprocessing.clip if clip else Preprocessing.siglip
    family = dict(causal=True, pool="eos", eos_token=None if eos == LEGACY_EOS else eos) if clip else {}
    return DualEncoderConfig(
        vision=ViTConfig(image_size, patch, vision_width, **_tower(vision), class_token=clip),
        text=TextConfig(vocab_size, length, text_width, **_tower(text), **family),
        embed_dim=arrays.shape(projection, 2)[0],
        pool="class" if clip else "map",
        image_projection=clip,
        projection_bias=not clip,
        initial_bias=None if clip else -10.0,
        preprocessing=preprocessing or default(image_size),
    )


def _tower(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of either tower that no array tells."""
    return {
        "depth": values["num_hidden_layers"],
        "mlp_dim": values["intermediate_size"],
        "num_heads": values["num_attention_heads"],
        "eps": values["layer_norm_eps"],
        "activation": ACTIVATIONS[values["hidden_act"]],
    }


def to_hugging_face(config: DualEncoderConfig) -> dict[str, Any]:
    """Our config as config.json has it; `model_config` is its inverse.

    Raises:
      UserError: a model that is neither SigLIP nor CLIP as transformers has them.
    """
    vision, text = config.vision, config.text
    clip = vision.class_token
    siglip = (config.pool, text.pool, text.causal) == ("map", "last", False) and config.initial_bias is not None
    joined = (text.causal, text.pool == "eos", config.image_projection, not config.projection_bias)
    if set(joined) != {clip} or siglip == clip:
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
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation],
    }
