"""Adapter folders without the base, of the methods in adapt/peft/methods.py; LoRA has peft's folders, see peft.py.

Dual encoders have folders of the same form (prompt_folder.py).

adapter.json            {"method": "prefix", "size": 16, "targets": null}: the method and its options
adapter.safetensors     the arrays that the method exports, the trained ones by path
difference.npz          the same, of diff pruning
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paligemma_jax.adapt.method import Method
from paligemma_jax.adapt.peft.diff_pruning import DiffPruning
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.adapters.peft import save_peft
from train_jax.core.errors import UserError

DESCRIPTION, ARRAYS = "adapter.json", "adapter.safetensors"
FILES = {DiffPruning.name: "difference.npz"}
"""Files of arrays by method, where it is not ARRAYS."""

OPTIONS = ("size", "targets")
"""Options in the description."""


def save_adapter(model: PaliGemma, folder: str | Path, method: Method[PaliGemma], base: str | None = None) -> None:
    """Writes what a method trained.

    Args:
      model: with the method attached.
      folder: created if missing.
      method: with the options that it was attached with.
      base: path of the base, noted in a folder of peft.
    """
    if method.in_peft_format:
        save_peft(model, folder, base=base)
        return
    options = {name: value for name, value in dataclasses.asdict(method).items() if name in OPTIONS}
    description = {"method": method.name} | dict.fromkeys(OPTIONS) | options
    write_folder(Path(folder), description, method.export(model), FILES.get(method.name, ARRAYS))


def write_folder(
    folder: Path, description: Mapping[str, Any], arrays: Mapping[str, jax.Array | np.ndarray], file: str = ARRAYS
) -> None:
    """Writes a description and arrays by name; the folder is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    on_host: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}  # Any: savez has options too
    if file.endswith(".npz"):
        np.savez_compressed(folder / file, **on_host)
    else:
        save_file(on_host, folder / file)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: str | Path) -> bool:
    """Returns whether a folder is one of ours, of any method but those in peft's format."""
    return (Path(folder).expanduser() / DESCRIPTION).is_file()


def load_adapter(model: PaliGemma, folder: str | Path) -> PaliGemma:
    """Attaches an adapter that `save_adapter` wrote to its base; a folder of peft is for `load_peft`.

    Returns:
      The model; for diff pruning a plain one with its entries changed.

    Raises:
      UserError: files that are missing or broken, an unknown method, or an adapter of another model.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        kind = METHODS[description["method"]]
        options = {name: description[name] for name in OPTIONS if description[name] is not None}
        method = kind(**options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} names no method of {', '.join(METHODS)} ({error}): restore it."
        ) from None
    file = FILES.get(method.name, ARRAYS)
    return method.load(model, read_arrays(folder, file), source=str(folder / file))


def read_arrays(folder: Path, file: str = ARRAYS) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder by name.

    Raises:
      UserError: a file that is missing or broken.
    """
    try:
        if not file.endswith(".npz"):
            return load_file(folder / file)
        with np.load(folder / file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder / file} cannot be read ({error}), expected the adapter's arrays: restore it."
        ) from None
