"""Prompts and adapters of a dual encoder on disk, apart from their base, in a folder as of method_folder.py.

adapter.json            {"method": "prompts", "config": {"text_tokens": 2, ...}, "base": {"text/...": [...], ...}}
adapter.safetensors     what trained, by path

`base` holds a few numbers of the base, by which another one of the same sizes is told.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx

from paligemma_jax.adapt.few_shot.prompts import TRAINABLE, PromptConfig, attach_prompts
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.weights.adapters.method_folder import DESCRIPTION, put_arrays, read_arrays, write_folder
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

METHOD = "prompts"
MARKS = ("text/position_embedding", "vision/post_layernorm/scale", "text_projection/kernel")
"""Arrays that no option of loading resizes, of which the numbers are."""
_NUMBERS = 8
_TOLERANCE = dict(rtol=2e-2, atol=1e-3)  # above what rounding to bfloat16 does


def save_prompts(model: DualEncoder, folder: str | Path) -> None:
    """Writes what is attached to a dual encoder.

    Args:
      model: with prompts.
      folder: made if missing.

    Raises:
      UserError: the model has none.
    """
    if model.prompts is None:
        raise UserError("the model has no prompts, expected some to be saved: attach them first.")
    arrays = param_tree.flatten(model)
    description = {
        "method": METHOD,
        "config": dataclasses.asdict(model.prompts.config),
        "base": {name: numbers.tolist() for name, numbers in _marks(model).items()},
    }
    chosen = patterns.select(TRAINABLE, arrays, what="prompts")
    write_folder(Path(folder).expanduser(), description, {path: arrays[path] for path in chosen})


def load_prompts(model: DualEncoder, folder: str | Path) -> DualEncoder:
    """Attaches what `save_prompts` wrote to its base, in place; embeddings are those before it was saved, to the bit.

    Raises:
      UserError: files that are not there or broken, or prompts of another model; the model stays as it is.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["method"] != METHOD:
            raise ValueError(f"its method is {description['method']!r}")
        config, base = PromptConfig(**description["config"]), dict(description["base"])
        _check_types(config)
        base = {name: np.array(numbers, np.float32) for name, numbers in base.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} tells no prompts of a dual encoder ({error}), expected one that save_prompts "
            "wrote: give another folder."
        ) from None
    arrays = read_arrays(folder)
    attached = attach_prompts(nnx.merge(*nnx.split(model)), config, rngs=nnx.Rngs(0))
    paths = patterns.select(TRAINABLE, param_tree.abstract(attached), what="prompts")
    filled = put_arrays(attached, arrays, paths, folder)
    _check_base(model, base, folder)
    model.prompts = filled.prompts
    return model


def _check_types(config: PromptConfig) -> None:
    """Raises TypeError for a value that JSON has and a config has not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, field.type) or isinstance(value, bool) != (field.type is bool):  # bools are ints
            raise TypeError(f"{field.name} is {value!r}")


def _check_base(model: DualEncoder, noted: dict[str, np.ndarray], folder: Path) -> None:
    """Raises UserError if the numbers noted are not those of the model."""
    found = _marks(model)
    both = [name for name in found if name in noted]  # a quantised kernel has no such numbers
    wrong = [
        name
        for name in both
        if found[name].shape != noted[name].shape or not np.allclose(found[name], noted[name], **_TOLERANCE)
    ]
    if wrong:
        raise UserError(
            f"{folder} was trained on another base: {', '.join(wrong)} differ, expected the weights that it was "
            "trained on: load it on those."
        )


def _marks(model: DualEncoder) -> dict[str, np.ndarray]:
    """A few numbers of the base, float32, by the path of the array that they are of."""
    arrays = param_tree.flatten(model)
    return {name: _first(arrays[name]) for name in MARKS if name in arrays}


def _first(array) -> np.ndarray:
    return np.asarray(array[(0,) * (array.ndim - 1)][:_NUMBERS], np.float32)
