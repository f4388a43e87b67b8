"""Our own format: an Orbax folder of the parameters by our paths, with the sizes in a config.json beside it.

It can be read onto any sharding and needs no name table; conversions use it for models that are loaded often.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from paligemma_jax.adapt.quantization.quantize import FROZEN, quantize, quantized_kernels
from paligemma_jax.adapt.quantization.quantized_kernel import QUANTIZATION_KINDS
from paligemma_jax.files.side_files import read_json
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.weights.checkpoint import Checkpoint, Config, whole_model
from paligemma_jax.weights.name_table import Row
from paligemma_jax.weights.orbax.config import config_from_dict, config_to_dict
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer, copy_tokenizer
from train_jax.core import param_tree
from train_jax.core.errors import UserError

M = TypeVar("M", bound=nnx.Module)
ARRAYS = "params"
DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = {"kind", "dtype", "block_size", "double"}  # of a quantised kernel


class OrbaxArrays:
    """Reads the arrays of an Orbax folder, one at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            metadata = self._reader.metadata(path.absolute()).item_metadata
            if metadata is None:
                raise ValueError("it has no metadata of arrays")
            tree = metadata.tree
            self._shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.items()}
        except Exception as error:  # Orbax and TensorStore raise many types for files that are missing or cut off
            raise self._broken(error) from None

    def names(self) -> set[str]:
        """Returns the names of all arrays."""
        return set(self._shapes)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, without reading it."""
        return np.dtype(self._shapes[name].dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        arguments = ocp.args.PyTreeRestore(
            item={name: self._shapes[name]},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        try:
            return self._reader.restore(self.path.absolute(), args=arguments)[name]
        except Exception as error:  # as above
            raise self._broken(error) from None

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """Yields the slices of an array's first axis."""
        array = self[name]
        for i in range(len(array)):
            yield array[i, ...]  # an array even if a layer is one number

    def _broken(self, error: Exception) -> UserError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return UserError(f"{self.path} cannot be read as an Orbax checkpoint ({reason}): convert the model again.")


def is_native(folder: Path) -> bool:
    """Returns whether a folder is laid out as `save_orbax` writes it."""
    return (folder / ARRAYS).is_dir() and (folder / "config.json").is_file()


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder that `save_orbax` wrote.

    Raises:
      UserError: it is broken, or was written by another version of this package.
    """
    file = folder / "config.json"
    values = read_json(file)
    config, kernels = config_from_dict(values, file), quantized_from_dict(values, file)

    def build(config: Config) -> PaliGemma | DualEncoder:
        return with_quantized(whole_model(config), kernels)

    arrays = OrbaxArrays(folder / ARRAYS)
    shapes = param_tree.abstract(nnx.eval_shape(lambda: build(config)))
    rows = [Row(path, path, dtype=shapes[path].dtype.name if re.fullmatch(FROZEN, path) else None) for path in shapes]
    for row in rows:
        if row.dtype and row.theirs in arrays.names() and arrays.dtype(row.theirs) != row.dtype:
            raise UserError(
                f"{arrays.path}: {row.theirs} is {arrays.dtype(row.theirs)}, expected {row.dtype} of a quantised "
                "kernel: convert the model again."
            )
    embedding = "decoder/embed_tokens" if isinstance(config, PaliGemmaConfig) else "text/token_embedding"
    return Checkpoint(arrays, arrays.names(), rows, config, f"{embedding}/embedding", build)


def save_orbax(model: PaliGemma | DualEncoder, folder: str | Path, tokenizer: str | Path | None = None) -> None:
    """Writes a model that `pg.load` reads back bit for bit, with config and preprocessing.

    Args:
      model: with plain or quantised kernels, which are stored as they are; without adapters.
      folder: created if missing; must not hold such a model.
      tokenizer: see `save_hugging_face`.

    Raises:
      UserError: the model has adapters, the folder holds a model, or there are no tokenizer files.
    """
    folder = Path(folder).expanduser()
    if (folder / ARRAYS).exists():
        raise UserError(f"{folder} holds a model already: choose another folder.")
    arrays = param_tree.flatten(model)
    kernels = quantized_to_dict(model)
    expected = param_tree.abstract(nnx.eval_shape(lambda: with_quantized(whole_model(model.config), kernels)))
    if set(arrays) != set(expected):
        different = sorted(set(arrays) ^ set(expected))[0]
        raise UserError(
            f"{folder} holds the parameters of a whole model, but found {different} in it or missing: merge adapters "
            "first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    writer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    writer.save((folder / ARRAYS).absolute(), args=ocp.args.PyTreeSave(arrays))
    writer.close()
    values = config_to_dict(model.config) | ({"quantized": kernels} if kernels else {})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None and isinstance(model, DualEncoder):
        copy_text_tokenizer(tokenizer, folder, model.config.text.length)
    elif tokenizer is not None:
        copy_tokenizer(tokenizer, folder)


def quantized_to_dict(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Returns how every quantised kernel is stored, by module path, as JSON values."""
    return {
        path.removesuffix("/kernel"): {"kind": kernel.kind, "dtype": kernel.dtype.name}
        | dataclasses.asdict(kernel.codec)
        for path, kernel in quantized_kernels(model).items()
    }


def quantized_from_dict(values: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Returns the output of `quantized_to_dict` from a whole config; empty if it has none.

    Raises:
      UserError: the entry is not valid.
    """
    kernels = values.get("quantized", {})
    for path, options in kernels.items() if isinstance(kernels, dict) else [("", kernels)]:
        valid = isinstance(options, dict) and options.keys() <= OPTIONS and options.get("kind") in QUANTIZATION_KINDS
        if not valid or options.get("dtype") not in DTYPES or type(options.get("double", False)) is not bool:
            raise UserError(
                f"{file} has {options!r} for the quantised kernel {path!r}, expected its kind and dtype: convert it "
                "again."
            )
    return kernels


def with_quantized(model: M, kernels: dict[str, dict[str, Any]]) -> M:
    """Quantises these kernels of a model in place and returns it; abstract under `nnx.eval_shape`.

    Raises:
      UserError: a kernel that the model does not have, or a codec that does not exist.
    """
    for path, options in kernels.items():
        given = {name: value for name, value in options.items() if name not in ("kind", "dtype")}
        quantize(model, options["kind"], **given, targets=re.escape(path))
    for path, kernel in quantized_kernels(model).items():
        kernel.dtype = np.dtype(kernels[path.removesuffix("/kernel")]["dtype"])
    return model
