"""`pg.load`: one function that reads a model from wherever it lies."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig, variant
from paligemma_jax.models.vit import resample_positions
from paligemma_jax.weights import big_vision, hugging_face
from paligemma_jax.weights.folder import Folder, read_json
from train_jax import params
from train_jax.errors import UserError

TINY = Path(__file__).parent.parent / "tiny"
DTYPES = ("float32", "bfloat16", "float16")
RANDOM = "random:"
POSITIONS = "vision/position_embedding"


def load(
    path: str | Path,
    dtype: str = "float32",
    *,
    image_size: int | None = None,
    param_dtype: str | None = None,
    remat: str = "none",
    unroll: bool = False,
    **decoder,
) -> PaliGemma:
    """Reads a PaliGemma.

    Args:
      path: a folder as transformers saves it, a big_vision `.npz` file, "tiny" (the model that ships with this
        package), or "random:3b-224" for random weights of a variant's sizes (to measure memory and speed).
      dtype: compute dtype, float32, bfloat16 or float16.
      image_size: pixels a side, where it should differ from the checkpoint's: the learned positions are resampled
        with the kernel of the checkpoint's family (big_vision bilinear, transformers bicubic).
      param_dtype: dtype the weights are kept in, `dtype` when None.
      remat, unroll: what the backward pass recomputes, and whether layers are compiled without a loop; see
        models.layers.scan_stack.
      decoder: GemmaConfig fields that an npz cannot tell (attn_softcap, final_softcap, rope_theta, query_scale).

    Returns:
      The model; `model.config` holds its sizes and its preprocessing.

    Raises:
      UserError: no such file or folder, another format, an unknown dtype, an image size that is no multiple of the
        patch size, or arrays that do not match the model; nothing is half loaded.
    """
    for kind in (dtype, param_dtype or dtype):
        if kind not in DTYPES:
            raise UserError(f"the dtype is {kind!r}, expected one of {', '.join(DTYPES)}: choose one of these.")
    both = dict(dtype=dtype, param_dtype=param_dtype or dtype, remat=remat, unroll=unroll)
    if str(path).startswith(RANDOM):
        return _random(str(path), image_size, both)
    source, config, read = _open(path, decoder)
    stored = config
    if image_size is not None and image_size != config.vision.image_size:
        config = _resized(config, image_size)
    config, stored = config.replace(both=both), stored.replace(both=both)
    model = nnx.eval_shape(lambda: PaliGemma(config, rngs=nnx.Rngs(0)))
    shapes = params.abstract(nnx.eval_shape(lambda: PaliGemma(stored, rngs=nnx.Rngs(0))))
    arrays = read(source, stored, shapes, jnp.dtype(both["param_dtype"]))
    if config.vision.grid != stored.vision.grid:
        method = "bilinear" if config.preprocessing.source == "big_vision" else "bicubic"
        table = resample_positions(arrays[POSITIONS].astype("float32"), config.vision.grid, method)
        arrays[POSITIONS] = table.astype(arrays[POSITIONS].dtype)
    return params.assign(model, {path: jnp.asarray(array) for path, array in arrays.items()})


def _random(path: str, image_size: int | None, both: dict) -> PaliGemma:
    """A new model of a variant's sizes."""
    try:
        config = variant(path.removeprefix(RANDOM))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    config = dataclasses.replace(config, preprocessing=Preprocessing.siglip(config.vision.image_size))
    if image_size is not None:
        config = _resized(config, image_size)
    config = config.replace(both=both)
    return nnx.jit(lambda: PaliGemma(config, rngs=nnx.Rngs(0)))()


def _open(path: str | Path, decoder: dict):
    """Which reader a path belongs to: its source, its config and its read function."""
    folder = TINY if str(path) == "tiny" else Path(path).expanduser()
    if folder.is_dir():
        arrays = Folder(folder)
        config = hugging_face.model_config(hugging_face.read_config(folder), arrays, _preprocessing(folder))
        if decoder:
            config = config.replace(decoder=decoder)
        return arrays, config, hugging_face.read
    if folder.suffix == ".npz" and folder.exists():
        arrays = big_vision.Npz(folder)
        return arrays, big_vision.model_config(arrays, **decoder), big_vision.read
    raise UserError(
        f"no model at {path}: expected a Hugging Face folder, a big_vision .npz file, or the word tiny; check the path."
    )


def _preprocessing(folder: Path) -> Preprocessing | None:
    """A folder's own preprocessor_config.json, where it has one."""
    file = folder / "preprocessor_config.json"
    return Preprocessing.from_hugging_face(read_json(file)) if file.exists() else None


def _resized(config: PaliGemmaConfig, image_size: int) -> PaliGemmaConfig:
    """The same model for another image size."""
    patch = config.vision.patch_size
    if image_size < 1 or image_size % patch:
        raise UserError(
            f"image_size is {image_size}, expected a multiple of the patch size {patch}: choose "
            f"{max(image_size // patch, 1) * patch}, say."
        )
    preprocessing = dataclasses.replace(config.preprocessing, size=image_size)
    return dataclasses.replace(config.replace(vision=dict(image_size=image_size)), preprocessing=preprocessing)
