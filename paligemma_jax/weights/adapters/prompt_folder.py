"""Folders with the prompts and adapters of a dual encoder, without the base, in the form of method_folder.py.

adapter.json            {"method": "prompts", "config": {"text_tokens": 2, ...}, "base": {"text/...": [...], ...}}
adapter.safetensors     the trained arrays by path

`base` holds a few numbers of the base's weights, to detect another base of the same sizes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax import nnx

from paligemma_jax.adapt.few_shot.learned_prompts import PromptedDualEncoder, attach_module
from paligemma_jax.adapt.few_shot.methods import LearnedPrompts
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.weights.adapters.method_folder import ARRAYS, DESCRIPTION, read_arrays, write_folder
from train_jax.core import param_tree
from train_jax.core.errors import UserError

SAMPLED = ("text/position_embedding", "vision/post_layernorm/scale", "text_projection/kernel")
"""Arrays that the numbers are taken from; no option of loading resizes them."""
_NUMBERS = 8
_RTOL, _ATOL = 2e-2, 1e-3  # larger than the error of rounding to bfloat16


def save_prompts(model: DualEncoder, folder: str | Path) -> None:
    """Writes the prompts and adapters of a dual encoder.

    Args:
      model: with prompts.
      folder: created if missing.

    Raises:
      UserError: the model has none.
    """
    if not isinstance(model, PromptedDualEncoder):
        raise UserError("the model has no prompts, expected some to be saved: attach them first.")
    description = {
        "method": LearnedPrompts.name,
        "config": dataclasses.asdict(model.prompts.config),
        "base": {name: numbers.tolist() for name, numbers in _samples(model).items()},
    }
    write_folder(Path(folder).expanduser(), description, LearnedPrompts(model.prompts.config).export(model))


def load_prompts(model: DualEncoder, folder: str | Path) -> DualEncoder:
    """Attaches prompts that `save_prompts` wrote to their base, in place; embeddings are restored bit for bit.

    Raises:
      UserError: files that are missing or broken, or prompts of another model; the model is then unchanged.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["method"] != LearnedPrompts.name:
            raise ValueError(f"its method is {description['method']!r}")
        config, base = PromptConfig(**description["config"]), dict(description["base"])
        _check_types(config)
        base = {name: np.array(numbers, np.float32) for name, numbers in base.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} holds no prompts of a dual encoder ({error}), expected one that save_prompts "
            "wrote: give another folder."
        ) from None
    arrays = read_arrays(folder)
    filled = LearnedPrompts(config).load(nnx.clone(model), arrays, source=str(folder / ARRAYS))
    _check_base(model, base, folder)
    assert isinstance(filled, PromptedDualEncoder)  # as `load` attaches prompts
    return attach_module(model, filled.prompts)


def _check_types(config: PromptConfig) -> None:
    """Raises TypeError for a value of JSON that a config cannot have."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), cast(Any, field.type)  # a class or a union, no string
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):  # bools are ints
            raise TypeError(f"{field.name} is {value!r}")


def _check_base(model: DualEncoder, recorded: dict[str, np.ndarray], folder: Path) -> None:
    """Raises UserError if the recorded numbers are not those of the model."""
    samples = _samples(model)
    common = [name for name in samples if name in recorded]  # a quantised kernel has no such numbers
    wrong = [
        name
        for name in common
        if samples[name].shape != recorded[name].shape or not np.allclose(samples[name], recorded[name], _RTOL, _ATOL)
    ]
    if wrong:
        raise UserError(
            f"{folder} was trained on another base: {', '.join(wrong)} differ, expected the weights that it was "
            "trained on: load it on those."
        )


def _samples(model: DualEncoder) -> dict[str, np.ndarray]:
    """Returns a few numbers of the base, float32, by the path of their array."""
    arrays = param_tree.flatten(model)
    return {name: _first(arrays[name]) for name in SAMPLED if name in arrays}


def _first(array) -> np.ndarray:
    return np.asarray(array[(0,) * (array.ndim - 1)][:_NUMBERS], np.float32)
