"""Reads and writes a model's sizes in the config.json of our own format."""

import dataclasses
from pathlib import Path
from typing import Any

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.checkpoint import Config
from train_jax.core.errors import UserError

FORMAT = "paligemma_jax"
# Classes of a model's config and of its second tower's config, by that tower's name.
PARTS = {"decoder": (PaliGemmaConfig, GemmaConfig), "text": (DualEncoderConfig, TextConfig)}


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns a config as JSON values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        if isinstance(value, Preprocessing):
            values[name] = value.to_dict()
        elif isinstance(value, ViTConfig | GemmaConfig | TextConfig):
            values[name] = dataclasses.asdict(value)
    return {"format": FORMAT} | values


def config_from_dict(values: dict[str, Any], file: Path) -> Config:
    """Returns the config that `config_to_dict` wrote.

    Raises:
      UserError: unknown fields, or another format.
    """
    if values.get("format") != FORMAT:
        raise UserError(f"{file} has format {values.get('format')!r}, expected {FORMAT!r}: give another folder.")
    try:
        tower = "text" if "text" in values else "decoder"
        make, make_tower = PARTS[tower]
        fields = {name: value for name, value in values.items() if name not in ("format", "quantized")}
        preprocessing = fields.get("preprocessing")
        return make(
            **fields
            | {
                "vision": ViTConfig(**fields["vision"]),
                tower: make_tower(**fields[tower]),
                "preprocessing": None if preprocessing is None else Preprocessing.from_dict(preprocessing),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a model of this version ({error}): convert it again.") from None
