"""Reads models from checkpoints of all formats (`load`, behind `pg.load`)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.adapt.quantization import quantize as quantization
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel
from paligemma_jax.files import hub
from paligemma_jax.files.shipped import SHIPPED, local
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.models import variants
from paligemma_jax.models.attention import KERNELS
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.paligemma import PaliGemma, variant
from paligemma_jax.models.projection import projections
from paligemma_jax.models.stack import REMAT_POLICIES
from paligemma_jax.models.vit import ViT, resample_positions
from paligemma_jax.weights.big_vision import paligemma as big_vision
from paligemma_jax.weights.checkpoint import Checkpoint, Config, whole_model
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from paligemma_jax.weights.hugging_face.folder import Folder
from paligemma_jax.weights.name_table import Transform, check_names, read_rows
from paligemma_jax.weights.orbax import checkpoint as orbax
from paligemma_jax.weights.random_init import random_arrays
from paligemma_jax.weights.tokenizer_files import check_added_tokens
from train_jax.core import param_tree
from train_jax.core.errors import UserError

M = TypeVar("M", bound=nnx.Module)
DTYPES = ("float32", "bfloat16", "float16")
RANDOM = "random:"
POSITIONS = "vision/position_embedding"
EMBEDDING = "decoder/embed_tokens/embedding"
OFF_AT_ZERO = ("attn_softcap", "final_softcap", "sliding_window")  # big_vision writes 0.0 for none


def load(
    path: str | Path,
    dtype: str = "float32",
    *,
    image_size: int | None = None,
    param_dtype: str | None = None,
    remat: str = "none",
    unroll: bool = False,
    attention: str = "auto",
    vocab_size: int | None = None,
    quantize: str | None = None,
    block_size: int = 64,
    double: bool = False,
    shardings: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None] | None = None,
    **decoder,
) -> PaliGemma | DualEncoder | ViT | Gemma:
    """Reads a PaliGemma, SigLIP or CLIP layer by layer.

    While loading, a host holds the leaves placed so far, the leaf being stacked (a kernel of all layers, or the token
    embedding) and one layer of it.

    Args:
      path: a folder as transformers saves it, "hf://owner/name" (needs huggingface_hub), a big_vision `.npz` file, a
        folder that `save_orbax` wrote, "tiny" or "tiny-siglip" (these ship with this package), or "random:3b-224" or
        "random:siglip-b16-224" for random weights of a variant's sizes (models.paligemma.variant, models.variants).
        "file.npz:img" and "file.npz:llm" give one tower, as a ViT or a Gemma.
      dtype: compute dtype, float32, bfloat16 or float16.
      image_size: pixels a side, if not the checkpoint's: the learned positions are resampled with the kernel of the
        checkpoint's family (big_vision bilinear, transformers bicubic).
      param_dtype: dtype of the parameters, `dtype` if None.
      remat, unroll: what the backward pass recomputes, and whether layers are compiled without a loop; see
        models.stack.scan_stack.
      attention: the kernel of attention, see models.attention.has_flash.
      vocab_size: rows of the token embedding, if not the checkpoint's (257,152 in big_vision, 257,216 in transformers):
        the last rows are removed, or rows are added with the mean of all others, whose logit is never the largest.
      quantize, block_size, double: "nf4", "int8" or "int4" quantises kernels while loading, with the same result as
        adapt.quantization.quantize.quantize.
      shardings: maps a leaf's path and shape to its sharding (None: the default device); it is placed there directly.
      decoder: GemmaConfig fields that an npz does not have (attn_softcap, final_softcap, sliding_window, rope_theta,
        query_scale).

    Returns:
      The model; `model.config` holds its sizes and its preprocessing.

    Raises:
      UserError: no such file or folder, another format, an unknown dtype, remat or attention, an image size that is no
        multiple of the patch size, or arrays that do not match the model; no partly loaded model is returned.
    """
    both: dict[str, Any] = dict(
        dtype=dtype, param_dtype=param_dtype or dtype, remat=remat, unroll=unroll, attention=attention
    )
    _check_options(both, vocab_size)
    codec = (quantize, block_size, double) if quantize else None
    if str(path).startswith(RANDOM):
        return _random(str(path), image_size, vocab_size, both, codec, shardings)
    decoder = {name: value or None if name in OFF_AT_ZERO else value for name, value in decoder.items()}
    checkpoint = _open(path, decoder)
    stored = checkpoint.config.replace(both=both)
    config = _changed(stored, image_size, vocab_size)
    _check_vocabulary(checkpoint.source.path, config)
    shapes = param_tree.abstract(nnx.eval_shape(lambda: checkpoint.build(stored)))
    check_names(checkpoint.rows, checkpoint.names, shapes, str(checkpoint.source.path))
    model = nnx.eval_shape(lambda: _quantized(checkpoint.build(config), codec))
    transform = _quantizer(model, codec) if codec else None
    arrays = {}
    for name, array in read_rows(checkpoint.rows, checkpoint.source, shapes, jnp.dtype(both["param_dtype"]), transform):
        array = _fitted(name, array, stored, config)
        leaf = jax.ShapeDtypeStruct(array.shape, array.dtype)
        arrays[name] = placed(array, shardings(name, leaf) if shardings else None)
    return param_tree.assign(model, arrays)


def new(
    path: str | Path,
    dtype: str = "float32",
    *,
    image_size: int | None = None,
    param_dtype: str | None = None,
    remat: str = "none",
    unroll: bool = False,
    attention: str = "auto",
    quantize: str | None = None,
    block_size: int = 64,
    double: bool = False,
) -> PaliGemma | DualEncoder | ViT | Gemma:
    """Returns a model like `load`, but with random weights.

    Only sizes are read: under `nnx.eval_shape` it needs nothing but the checkpoint's config (or an npz's headers).
    Arguments and errors: see `load`.
    """
    both: dict[str, Any] = dict(
        dtype=dtype, param_dtype=param_dtype or dtype, remat=remat, unroll=unroll, attention=attention
    )
    _check_options(both, None)
    codec = (quantize, block_size, double) if quantize else None
    if str(path).startswith(RANDOM):
        return _random(str(path), image_size, None, both, codec, None)
    checkpoint = _open(path, {})
    return _quantized(checkpoint.build(_changed(checkpoint.config.replace(both=both), image_size, None)), codec)


def _check_vocabulary(local_path: Path, config: Config) -> None:
    """Refuses a folder whose tokenizer adds tokens beyond the embedding's rows; further rows are padding."""
    if local_path.is_dir():
        text = config.text if isinstance(config, DualEncoderConfig) else config.decoder
        check_added_tokens(local_path, text.vocab_size)


def _check_options(both: dict, vocab_size: int | None) -> None:
    """Refuses options with invalid values."""
    for kind in (both["dtype"], both["param_dtype"]):
        if kind not in DTYPES:
            raise UserError(f"the dtype is {kind!r}, expected one of {', '.join(DTYPES)}: choose one of these.")
    remat = both["remat"]
    if remat != "none" and remat not in REMAT_POLICIES:
        raise UserError(f"remat is {remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}: choose one of these.")
    if both["attention"] not in KERNELS:
        expected = ", ".join(KERNELS)
        raise UserError(f"attention is {both['attention']!r}, expected one of {expected}: choose one of these.")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size}, expected at least 1: leave it out to keep the checkpoint's.")


def stored_dtype(path: str | Path) -> str:
    """Returns the dtype that a checkpoint's weights are stored in, or float32 if models do not compute in it."""
    if str(path).startswith(RANDOM):
        return "float32"
    checkpoint = _open(path, {})
    name = checkpoint.source.dtype(checkpoint.dtype_of).name
    return name if name in DTYPES else "float32"


def _fitted(path: str, array: np.ndarray, stored: Config, config: Config) -> np.ndarray:
    """Returns a leaf at the image size and vocabulary of `config`; paths in a single tower lack the tower's name."""
    if POSITIONS.endswith(path) and config.vision.grid != stored.vision.grid:
        method = "bilinear" if preprocessing_of(config).source == "big_vision" else "bicubic"
        first, patches = np.split(array.astype("float32"), [int(config.vision.class_token)])
        return np.concatenate([first, resample_positions(patches, config.vision.grid, method)]).astype(array.dtype)
    if isinstance(config, DualEncoderConfig) or isinstance(stored, DualEncoderConfig):
        return array
    extra = config.decoder.vocab_size - stored.decoder.vocab_size
    if EMBEDDING.endswith(path) and extra:
        if extra < 0:
            return array[:extra]
        mean = array.mean(axis=0, dtype=np.float32).astype(array.dtype)
        return np.concatenate([array, np.broadcast_to(mean, (extra, len(mean)))])
    return array


def placed(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Places an array on its devices; on a CPU it is adopted without a copy if possible."""
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.device_put(array, sharding)


def _quantized(model: M, codec: tuple[str, int, bool] | None) -> M:
    return cast(M, quantization.quantize(model, *codec)) if codec else model


def _quantizer(model: nnx.Module, codec: tuple[str, int, bool]) -> Transform:
    """Returns a transform that quantises the kernels which are quantised in `model`, layer by layer."""
    kind, block_size, double = codec
    inputs = {
        f"{path}/kernel": len(module.in_shape)
        for path, module in projections(model).items()
        if isinstance(module.kernel, QuantizedKernel)
    }

    def transform(path: str, layer: np.ndarray) -> dict[str, np.ndarray] | None:
        if path not in inputs:
            return None
        parts = quantization.quantize_array(kind, layer, inputs[path], block_size, double)
        return {f"{path}/{name}": np.asarray(part) for name, part in parts.items()}

    return transform


def _random(
    path: str, image_size: int | None, vocab_size: int | None, both: dict[str, Any], codec, shardings
) -> PaliGemma | DualEncoder:
    """Returns a new model of a variant's sizes, created layer by layer with its final sharding."""
    name = path.removeprefix(RANDOM)
    try:
        config = variants.variant(name) if name.startswith(("siglip", "clip")) else variant(name)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    config = _changed(config, image_size, vocab_size).replace(both=both)
    finish = functools.partial(_quantized, codec=codec)
    model = nnx.eval_shape(lambda: finish(whole_model(config)))
    leaf_shardings = {
        path: shardings(path, leaf) if shardings else None for path, leaf in param_tree.abstract(model).items()
    }
    return param_tree.assign(model, random_arrays(config, finish, leaf_shardings))


def _open(path: str | Path, decoder: dict) -> Checkpoint:
    """Opens the checkpoint at a path with the reader of its format."""
    file, _, tower = str(path).rpartition(":") if ".npz:" in str(path) else (path, "", "")
    local_path = _local_path(file)
    if local_path.is_file():
        checkpoint = big_vision.open_file(local_path, tower, **decoder)
        return dataclasses.replace(checkpoint, config=_with_decoder(checkpoint.config, decoder, local_path))
    checkpoint = orbax.open_folder(local_path) if orbax.is_native(local_path) else hugging_face.open_folder(local_path)
    return dataclasses.replace(checkpoint, config=_with_decoder(checkpoint.config, decoder, local_path))


def _with_decoder(config: Config, decoder: dict, local_path: Path) -> Config:
    """Returns the config with the decoder's fields changed."""
    if not isinstance(config, DualEncoderConfig):
        return config.replace(decoder=decoder)
    if decoder:
        raise UserError(f"{local_path} is a dual encoder, which has no decoder: leave out {', '.join(decoder)}.")
    return config


def _local_path(path: str | Path) -> Path:
    """Returns the folder or the .npz file."""
    if hub.is_remote(path):
        return hub.download(path)
    local_path = local(path)
    if local_path.is_dir() or (local_path.suffix == ".npz" and local_path.is_file()):
        return local_path
    raise UserError(
        f"no model at {path}: expected a Hugging Face folder, a big_vision .npz file, hf://owner/name, or the name of "
        f"a model that ships with the package ({', '.join(SHIPPED)}); check the path."
    )


def weight_files(path: str | Path) -> list[Path]:
    """Returns the files that hold a model's weights; none for "random:...".

    Raises:
      UserError: as `load`.
    """
    if str(path).startswith(RANDOM):
        return []
    local_path = _local_path(str(path).rpartition(":")[0] if ".npz:" in str(path) else path)
    if orbax.is_native(local_path):
        return sorted(file for file in (local_path / orbax.ARRAYS).rglob("*") if file.is_file())
    return [local_path] if local_path.is_file() else Folder(local_path).files


def _changed(config: Config, image_size: int | None, vocab_size: int | None) -> Config:
    """Returns the model's config for another image size and vocabulary."""
    if vocab_size is not None and isinstance(config, DualEncoderConfig):
        raise UserError(
            f"vocab_size is {vocab_size}, but the model is a dual encoder, whose vocabulary is fixed: leave it out."
        )
    if image_size is not None and image_size != config.vision.image_size:
        config = _resized(config, image_size)
    if vocab_size is None or isinstance(config, DualEncoderConfig):
        return config
    return config.replace(decoder=dict(vocab_size=vocab_size))


def _resized(config: Config, image_size: int) -> Config:
    """Returns the model's config for another image size."""
    patch = config.vision.patch_size
    if image_size < 1 or image_size % patch:
        raise UserError(
            f"image_size is {image_size}, expected a multiple of the patch size {patch}: choose "
            f"{max(image_size // patch, 1) * patch}, say."
        )
    preprocessing = config.preprocessing and config.preprocessing.at(image_size)
    return dataclasses.replace(config.replace(vision=dict(image_size=image_size)), preprocessing=preprocessing)
