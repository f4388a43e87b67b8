"""Helpers of the readers of config.json: numbers, activations, sizes that arrays also give, and the vision tower."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.files.side_files import refusal
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.folder import Folder

# transformers' names of activations and ours; the first one listed for each of ours is written.
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
LARGEST = 1 << 31  # bound of sizes and ids, which arrays count in 32 bits
LAYERS = ("num_hidden_layers", "intermediate_size", "num_attention_heads")


def theirs(activation: str) -> str:
    """Returns transformers' name of an activation of ours."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


class Values:
    """One object of a config.json, with its place for error messages."""

    def __init__(self, values: Mapping[str, Any], file: Path, section: str = ""):
        """Keeps `values`; `section` is the prefix of key names in messages, such as "text_config."."""
        self._values, self.file, self.section = values, file, section

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, the default if it is missing or null."""
        value = self._values.get(key)
        return default if value is None else value

    def given(self, key: str) -> bool:
        """Returns whether the file has the key, even with null."""
        return key in self._values

    def refuse(self, key: str, expected: str, remedy: str = "correct it, or give another model"):
        """Returns the error for a value that cannot be used."""
        return refusal(self.file, self.section + key, self._values.get(key), expected, remedy)

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < LARGEST:
            raise self.refuse(key, "a positive number")
        return value

    def token(self, *keys: str) -> int | None:
        """Returns a token id, which may be under several names if they agree; None if all are missing."""
        ids = {key: value for key in keys if (value := self.get(key)) is not None}
        for key, value in ids.items():
            if type(value) is not int or not 0 <= value < LARGEST or value != next(iter(ids.values())):
                raise self.refuse(key, f"one token's id, the same at {' and '.join(keys)}")
        return next(iter(ids.values()), None)

    def number(self, key: str, default: float | int) -> float | int:
        """Returns a positive, finite number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(key, "a positive number")
        return value

    def activation(self, key: str, default: str) -> str:
        """Returns our name of an activation."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(key, f"one of {', '.join(ACTIVATIONS)}", "give another model")
        return ACTIVATIONS[value]

    def check_size(self, key: str, size: int, what: str) -> None:
        """Refuses a size that differs from the size of the weights; a missing key is fine."""
        value = self.get(key, size)
        if type(value) is not int or value != size:
            raise self.refuse(key, f"{size}, as {what} has", "correct config.json")


def vision_config(
    values: Values, arrays: Folder, prefix: str, defaults: Mapping[str, Any], class_token: bool = False
) -> ViTConfig:
    """Returns the config of a vision tower of a SigLIP, a CLIP or a PaliGemma.

    Args:
      values: of the key vision_config.
      arrays: of the folder; the tower's names begin with `prefix`.
      defaults: transformers' defaults for missing keys.
      class_token: whether it is a CLIP's.

    Raises:
      UserError: values that are invalid or contradict the arrays.
    """
    _, _, patch, _ = arrays.shape(f"{prefix}embeddings.patch_embedding.weight", 4)
    positions, width = arrays.shape(f"{prefix}embeddings.position_embedding.weight", 2)
    grid = round((positions - class_token) ** 0.5)
    image_size = _side(values, "image_size")
    if image_size is None:  # as in old files of PaliGemma
        image_size = defaults["image_size"] if defaults["image_size"] // patch == grid else grid * patch
    if image_size // patch != grid:
        raise values.refuse(
            "image_size", f"{grid * patch}, for {positions} positions in patches of {patch}", "correct config.json"
        )
    if _side(values, "patch_size") not in (None, patch):
        raise values.refuse("patch_size", f"{patch}, as the patch embedding has", "correct config.json")
    values.check_size("hidden_size", width, "the tower")
    return ViTConfig(image_size, patch, width, **tower_fields(values, defaults), class_token=class_token)


def tower_fields(values: Values, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a tower's config that arrays do not give."""
    depth, mlp_dim, heads = (values.size(key, defaults.get(key)) for key in LAYERS)
    return {
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": heads,
        "eps": values.number("layer_norm_eps", defaults["layer_norm_eps"]),
        "activation": values.activation("hidden_act", defaults["hidden_act"]),
    }


def _side(values: Values, key: str) -> int | None:
    """Returns the pixels a side, which may be written twice, [N, N]; None if they are missing."""
    value = values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if value is not None and (type(value) is not int or value < 1):
        raise values.refuse(key, "a positive number of pixels, as images are square here")
    return value
