"""config.json of PaliGemma 1 and 2 as transformers writes it, read and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.files.side_files import KnownKeys, account, read_json
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.weights.hugging_face.config_values import LAYERS, Values, theirs, vision_config
from paligemma_jax.weights.hugging_face.folder import Folder
from paligemma_jax.weights.hugging_face.paligemma_names import EMBEDDING, TOWER
from paligemma_jax.weights.hugging_face.transformers_keys import (
    GEMMA,
    GEMMA_2,
    PALIGEMMA,
    PALIGEMMA_TOKENS,
    PALIGEMMA_VISION,
)
from train_jax.core.errors import UserError

GENERATION = "generation_config.json"  # only its token ids are checked; sampling options are arguments here
SLIDING, FULL = "sliding_attention", "full_attention"
DECODERS = {"gemma": GEMMA, "gemma2": GEMMA_2}
PROJECTOR = "multi_modal_projector.linear.weight"
# Keys of rotary positions: the names of the scaling type, and options of scaled positions only.
ROPE_TYPES = ("rope_type", "type")
OF_SCALED = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "short_factor",
        "truncate",
    }
)
# transformers' defaults for keys that released models leave out.
VISION_DEFAULTS = {"image_size": 224, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the folder's config.json; every key of it is accounted for.

    Raises:
      UserError: it is missing or broken, of another architecture, lacks a size that the arrays do not give, or has a
        value that is not supported.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("model_type") != "paligemma":
        raise UserError(
            f"{file} describes a {config.get('model_type')!r} model, expected 'paligemma': give another folder."
        )
    account(config, PALIGEMMA, file)
    needed = {"text_config": ("model_type", *LAYERS, "num_key_value_heads"), "vision_config": LAYERS}
    for section, keys in needed.items():
        values = config.get(section, {})
        missing = [key for key in keys if not isinstance(values, dict) or values.get(key) is None]
        if missing:
            raise UserError(f"{file} lacks {section}.{missing[0]}: add it, as newer transformers write it.")
    text = config["text_config"]
    if not isinstance(text["model_type"], str) or text["model_type"] not in DECODERS:
        raise UserError(
            f"{file} has a text model {text['model_type']!r}, expected 'gemma' or 'gemma2': give another folder."
        )
    account(text, DECODERS[text["model_type"]], file, "text_config.")
    account(config["vision_config"], PALIGEMMA_VISION, file, "vision_config.")
    if (file := folder / GENERATION).exists():
        tokens = {key: value for key, value in read_json(file).items() if key in PALIGEMMA_TOKENS}
        account(tokens, KnownKeys(only=PALIGEMMA_TOKENS), file)
    return config


def model_config(config: dict[str, Any], arrays: Folder) -> PaliGemmaConfig:
    """Returns our config from theirs; missing keys come from the arrays or from the released models.

    Raises:
      UserError: values that are invalid, not supported, or contradict the arrays.
    """
    file = arrays.path / "config.json"
    whole = Values(config, file)
    width, _ = arrays.shape(PROJECTOR, 2)
    whole.check_size("projection_dim", width, PROJECTOR)
    return PaliGemmaConfig(
        vision=vision_config(Values(config["vision_config"], file, "vision_config."), arrays, TOWER, VISION_DEFAULTS),
        decoder=_decoder(Values(config["text_config"], file, "text_config."), arrays),
        image_token=whole.token("image_token_index", "image_token_id"),
    )


def untied(config: dict[str, Any]) -> bool:
    """Returns whether a config asks for an untied output embedding."""
    return False in (config.get("tie_word_embeddings"), config["text_config"].get("tie_word_embeddings"))


def _decoder(text: Values, arrays: Folder) -> GemmaConfig:
    """Returns the decoder's sizes and constants."""
    gemma2 = text.get("model_type") == "gemma2"
    vocab, width = arrays.shape(EMBEDDING, 2)
    text.check_size("vocab_size", vocab, EMBEDDING)
    text.check_size("hidden_size", width, EMBEDDING)
    depth, head_dim = text.size("num_hidden_layers"), text.size("head_dim", 256)
    windowed = _windowed(text, depth)
    own: dict[str, Any] = {}
    if gemma2:
        own = {
            "query_scale": text.number("query_pre_attn_scalar", 256) ** -0.5,
            "attn_softcap": _cap(text, "attn_logit_softcapping", 50.0),
            "final_softcap": _cap(text, "final_logit_softcapping", 30.0),
            "sliding_window": text.size("sliding_window", 4096) if windowed else None,
        }
    return GemmaConfig(
        vocab_size=vocab,
        width=width,
        depth=depth,
        mlp_dim=text.size("intermediate_size"),
        num_heads=text.size("num_attention_heads"),
        num_kv_heads=text.size("num_key_value_heads"),
        head_dim=head_dim,
        eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(text),
        activation=_activation(text, gemma2),
        post_norms=gemma2,
        **own,
    )


def _cap(text: Values, key: str, default: float) -> float | int | None:
    """Returns a soft cap: a positive number, the default if it is missing, None if it is null or zero."""
    value = text.get(key, None if text.given(key) else default)
    off = value is None or (type(value) in (int, float) and value == 0)
    return None if off else text.number(key, default)


def _windowed(text: Values, depth: int) -> bool:
    """Returns whether every other layer attends to a window only.

    Raises:
      UserError: layers in another order than Gemma 2's, or other layers than Gemma's.
    """
    kinds = text.get("layer_types")
    gemma2 = text.get("model_type") == "gemma2"
    if kinds is None:
        return gemma2 and (text.get("sliding_window") is not None or not text.given("sliding_window"))
    complete = isinstance(kinds, list) and len(kinds) == depth
    if complete and kinds == [FULL] * depth:
        return False
    if not gemma2:
        raise text.refuse("layer_types", f"{FULL} for every layer of a Gemma", "give another model")
    if not complete or kinds != _layer_types(depth):
        raise text.refuse("layer_types", f"{SLIDING} and {FULL} in turn as in Gemma 2", "give another model")
    return True


def _rope_theta(text: Values) -> float | int:
    """Returns the base of the rotary positions.

    Raises:
      UserError: positions that are scaled, or several bases.
    """
    bases = {text.number("rope_theta", 10_000.0)} if text.get("rope_theta") is not None else set()
    for key in ("rope_parameters", "rope_scaling"):
        values = text.get(key, {})
        if not isinstance(values, dict):
            raise text.refuse(key, "an object, or null")
        rope = Values(values, text.file, f"{text.section}{key}.")
        _check_unscaled(rope, values)
        if values.get("rope_theta") is not None:
            bases.add(rope.number("rope_theta", 10_000.0))
    if len(bases) > 1:
        raise text.refuse("rope_theta", f"{sorted(bases)[0]:g} or {sorted(bases)[1]:g} at every place", "name one base")
    return bases.pop() if bases else 10_000.0


def _check_unscaled(rope: Values, values: Mapping[str, Any]) -> None:
    """Refuses scaled rotary positions: linear with a factor other than 1, or of another type."""
    kinds = [(name, rope.get(name)) for name in ROPE_TYPES if rope.get(name) is not None]
    unscaled = type(values.get("factor")) in (int, float) and values["factor"] == 1
    for name, kind in kinds:
        if kind != "default" and not (kind == "linear" and unscaled):
            expected = "'default', or 'linear' with a factor of 1"
            raise rope.refuse(name, expected, "give a model whose positions are not scaled")
    for name, value in values.items():
        if value is None or name in (*ROPE_TYPES, *OF_SCALED, "rope_theta"):
            continue
        if name not in ("factor", "partial_rotary_factor"):
            raise rope.refuse(name, "positions that are not scaled, as Gemma's", "give another model")
        implied = name == "factor" and bool(kinds)  # the type was checked above, together with the factor
        if not implied and (type(value) not in (int, float) or value != 1):
            raise rope.refuse(name, "1.0", "give a model whose positions are not scaled")


def _activation(text: Values, gemma2: bool) -> str:
    """Returns the activation of the gate.

    Gemma has it at hidden_act, where "gelu" means the tanh form, and Gemma 2 at hidden_activation. The key that a
    release does not read must not name another one.
    """
    key, other = ("hidden_activation", "hidden_act") if gemma2 else ("hidden_act", "hidden_activation")
    activation = text.activation(key, "gelu_pytorch_tanh")
    if not gemma2 and text.get(key) == "gelu":
        activation = "gelu_tanh"
    if text.get(other) is not None:
        second = "gelu_tanh" if gemma2 and text.get(other) == "gelu" else text.activation(other, "")
        if second != activation:
            raise text.refuse(other, f"the {theirs(activation)} of {text.section}{key}", "give both the same value")
    return activation


def _layer_types(depth: int) -> list[str]:
    """Returns the layer types of Gemma 2."""
    return [(SLIDING, FULL)[i % 2] for i in range(depth)]


def to_hugging_face(config: PaliGemmaConfig, image_token: int) -> dict[str, Any]:
    """Returns our config as config.json; `model_config` is its inverse.

    Args:
      config: of one of our models.
      image_token: id of the image placeholder in transformers' input.
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
            **(_gemma_2(text) if text.post_norms else {"hidden_act": _exact(text.activation)}),
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
            "hidden_act": theirs(vision.activation),
            "projection_dim": text.width,
            "vision_use_head": False,
        },
    }


def _exact(activation: str) -> str:
    """Returns the name of an activation in a Gemma's config, where "gelu" means the tanh form."""
    return "gelu_python" if activation == "gelu" else theirs(activation)


def _gemma_2(text: GemmaConfig) -> dict[str, Any]:
    """Returns the keys of Gemma 2's config that replace Gemma's."""
    scalar = (text.query_scale or text.head_dim**-0.5) ** -2
    full = [FULL] * text.depth
    return {
        "hidden_activation": theirs(text.activation),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": text.attn_softcap,
        "final_logit_softcapping": text.final_softcap,
        "sliding_window": text.sliding_window or 1 << 20,  # the latter for readers without layer_types
        "layer_types": _layer_types(text.depth) if text.sliding_window else full,
    }
