"""Adapter folders of the methods in adapt/peft/methods.py, without the base; for LoRA see peft.py.

Dual encoders have folders of the same form (prompt_folder.py).

adapter.json            {"method": "prefix", "size": 16, "targets": null}
adapter.safetensors     the trained arrays by path; for diff pruning difference.npz instead, the entries that change
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

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

M = TypeVar("M", bound=nnx.Module)
DESCRIPTION, ARRAYS, DIFFERENCE = "adapter.json", "adapter.safetensors", "difference.npz"


def save_adapter(
    model: PaliGemma, folder: str | Path, method: str, size: int | None = None, targets: str | None = None
) -> None:
    """Writes the trained arrays of a method.

    Args:
      model: with the method attached.
      folder: created if missing.
      method, size, targets: the options that it was attached with.
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
    """Writes a description and the arrays by path, if there are any; the folder is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        save_file({path: np.asarray(array) for path, array in arrays.items()}, folder / ARRAYS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: str | Path) -> bool:
    """Returns whether a folder was written by `save_adapter`."""
    return (Path(folder).expanduser() / DESCRIPTION).is_file()


def load_adapter(model: PaliGemma, folder: str | Path) -> PaliGemma:
    """Attaches an adapter that `save_adapter` wrote to its base.

    Returns:
      The model; for diff pruning a plain one with its entries changed.

    Raises:
      UserError: files that are missing or broken, an unknown method, or an adapter of another model.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name, size, targets = (description[key] for key in ("method", "size", "targets"))
        method = METHODS[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} names no method of {', '.join(METHODS)} ({error}): restore it."
        ) from None
    if name == "diff_pruning":
        return cast(PaliGemma, diff_pruning.add_sparse(model, folder / DIFFERENCE))
    arrays = read_arrays(folder)
    size = size or (method.size and method.size[1])
    model = cast(PaliGemma, method.attach(model, size, targets or method.targets, nnx.Rngs(0)))
    paths = patterns.select(_trainable(name, targets), param_tree.abstract(model), what="adapters")
    return put_arrays(model, arrays, paths, folder)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays by path.

    Raises:
      UserError: a file that is missing or broken.
    """
    try:
        return load_file(folder / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / ARRAYS} cannot be read ({error}), expected the adapter's arrays: restore it."
        ) from None


def put_arrays(model: M, arrays: Mapping[str, np.ndarray], paths: Iterable[str], folder: Path) -> M:
    """Returns the model with the arrays at `paths`, which they must match exactly.

    Raises:
      UserError: paths or shapes that do not match (lists them).
    """
    leaves = param_tree.abstract(model)
    expected = {path: leaves[path].shape for path in paths}
    shapes = {path: array.shape for path, array in arrays.items()}
    wrong = [
        f"{shapes.get(path, 'nothing')} for {path} where the model has {expected.get(path, 'nothing')}"
        for path in sorted(expected | shapes)
        if expected.get(path) != shapes.get(path)
    ]
    if wrong:
        raise UserError(
            f"{folder / ARRAYS} has {listed(wrong)}: it is an adapter of another model; load it on its own base."
        )
    return param_tree.assign(model, {path: jnp.asarray(array) for path, array in arrays.items()})


def _trainable(method: str, targets: str | None) -> str:
    pattern = METHODS[method].trainable or targets or METHODS[method].targets
    assert pattern is not None, f"the method {method} has neither trainable nor targets"
    return pattern
