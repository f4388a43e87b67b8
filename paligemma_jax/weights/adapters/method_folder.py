"""Adapters of the methods in adapt/peft/methods.py on disk, apart from their base; LoRA's are peft's folders (peft.py).

Those of dual encoders are folders of the same form (prompt_folder.py).

adapter.json            {"method": "prefix", "size": 16, "targets": null}
adapter.safetensors     what trained, by path; of diff pruning difference.npz instead, the entries that change
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paligemma_jax.adapt.peft import diff_pruning
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.name_table import listed
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

Model = TypeVar("Model", bound=nnx.Module)
DESCRIPTION, ARRAYS, DIFFERENCE = "adapter.json", "adapter.safetensors", "difference.npz"


def save_adapter(
    model: PaliGemma, folder: str | Path, method: str, size: int | None = None, targets: str | None = None
) -> None:
    """Writes what a method has trained.

    Args:
      model: with the method attached.
      folder: made if missing.
      method, size, targets: what it was attached with.
    """
    folder, arrays = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    if method == "diff_pruning":
        diff_pruning.save_sparse(model, folder / DIFFERENCE)
    else:
        arrays = param_tree.flatten(model)
        arrays = {path: arrays[path] for path in patterns.select(_trainable(method, targets), arrays, what="adapters")}
    write_folder(folder, {"method": method, "size": size, "targets": targets}, arrays)


def write_folder(folder: Path, description: Mapping[str, Any], arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes a description and the arrays by path, if there are any; the folder is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        save_file({path: np.asarray(array) for path, array in arrays.items()}, folder / ARRAYS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is one that `save_adapter` wrote."""
    return (Path(folder).expanduser() / DESCRIPTION).is_file()


def load_adapter(model: PaliGemma, folder: str | Path) -> PaliGemma:
    """Attaches what `save_adapter` wrote to its base.

    Returns:
      The model; of diff pruning a plain one, its entries changed.

    Raises:
      UserError: files that are not there or broken, an unknown method, or an adapter of another model.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name, size, targets = (description[key] for key in ("method", "size", "targets"))
        method = METHODS[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} tells no method of {', '.join(METHODS)} ({error}): restore it."
        ) from None
    if name == "diff_pruning":
        return diff_pruning.add_sparse(model, folder / DIFFERENCE)
    arrays = read_arrays(folder)
    model = method.attach(model, size or (method.size and method.size[1]), targets or method.targets, nnx.Rngs(0))
    paths = patterns.select(_trainable(name, targets), param_tree.abstract(model), what="adapters")
    return put_arrays(model, arrays, paths, folder)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays by path.

    Raises:
      UserError: a file that is not there or broken.
    """
    try:
        return load_file(folder / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / ARRAYS} cannot be read ({error}), expected the adapter's arrays: restore it."
        ) from None


def put_arrays(model: Model, arrays: Mapping[str, np.ndarray], paths: Iterable[str], folder: Path) -> Model:
    """The model with the arrays in the places of `paths`, all of which they must fill.

    Raises:
      UserError: the list of what does not fit.
    """
    shapes = param_tree.abstract(model)
    wanted = {path: shapes[path].shape for path in paths}
    found = {path: array.shape for path, array in arrays.items()}
    wrong = [
        f"{found.get(path, 'nothing')} for {path} where the model has {wanted.get(path, 'nothing')}"
        for path in sorted(wanted | found)
        if wanted.get(path) != found.get(path)
    ]
    if wrong:
        raise UserError(
            f"{folder / ARRAYS} has {listed(wrong)}: it is an adapter of another model; load it on its own base."
        )
    return param_tree.assign(model, {path: jnp.asarray(array) for path, array in arrays.items()})


def _trainable(method: str, targets: str | None) -> str:
    return METHODS[method].trainable or targets or METHODS[method].targets
