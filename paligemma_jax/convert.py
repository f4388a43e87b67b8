"""Converts a checkpoint to another format: python -m paligemma_jax.convert SRC DST --format=FORMAT [--push=REPO].

SRC       any path that pg.load reads as a whole PaliGemma, SigLIP or CLIP: a Hugging Face folder, hf://owner/name, a
          big_vision .npz, a folder written with --format=orbax, "tiny", or the workdir of a run. Adapters of a run are
          merged into the base; a quantised base is dequantised first.
          From orbax to orbax, quantised kernels are copied unchanged.
DST       a folder that does not exist yet (for big_vision, a file that ends in .npz).
--format  hugging_face (opened by transformers), big_vision (a .npz), orbax (loads fastest here), or peft: only the LoRA
          adapters of a run, unmerged, as peft opens them.
--dtype   float32, bfloat16 or float16; default: the dtype of SRC (float32 for a run).
--quantize  nf4, int8 or int4, with --format=orbax only: stores a quantised base that later loads as it is.
--push    owner/name: also uploads DST to the Hugging Face Hub.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from absl import flags
from flax import nnx

from paligemma_jax import loading
from paligemma_jax.adapt.lora.adapter import largest_logit_gap
from paligemma_jax.adapt.lora.merge_quantized import probe_inputs
from paligemma_jax.adapt.peft.methods import attached_to, merge
from paligemma_jax.adapt.quantization.quantize import dequantize, describe, is_quantized
from paligemma_jax.files import hub
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_orbax, save_peft
from paligemma_jax.weights.reader import stored_dtype
from paligemma_jax.weights.tokenizer_files import MODEL, SIGLIP_MODEL, tokenizer_files
from train_jax.config import command_line
from train_jax.core import param_tree
from train_jax.core.errors import UserError

ORBAX = "orbax"
FORMATS = ("hugging_face", "big_vision", ORBAX)  # formats of whole models
PEFT = "peft"
CHOICES = (*FORMATS, PEFT)


def convert(source: str, target: str, format: str, dtype: str | None = None, quantize: str | None = None) -> Path:
    """Reads a model and writes it in another format, with the source's tokenizer files beside it if it has them.

    Args:
      source, target, format, dtype, quantize: see the module.

    Returns:
      The path that was written.

    Raises:
      UserError: an unknown format, a target that exists, or a source that cannot be read.
    """
    path = checked_target(target, format, CHOICES)
    if quantize is not None and format != ORBAX:
        raise UserError(f"--quantize is {quantize} beside --format={format}, expected {ORBAX}, which stores it.")
    if hub.is_remote(source):
        source = str(hub.download(source))
    model = read(source, dtype, quantize=quantize)
    if format == PEFT:
        if not isinstance(model, PaliGemma):
            raise UserError(
                f"{source} is a dual encoder, which has no adapters for --format=peft: choose another format."
            )
        base = loading.run_config(source).model.path if loading.is_run(source) else source
        save_peft(model, path, base=base)
    else:
        keep_quantized = format == ORBAX and not attached_to(model)
        write(model if keep_quantized else plain(model), path, format, source)
    return path


def checked_target(target: str, format: str, formats: Sequence[str] = FORMATS) -> Path:
    """Returns the path that a model of this format is to be written to.

    Raises:
      UserError: an unknown format, a target that exists, or a big_vision target that does not end in .npz.
    """
    if format not in formats:
        raise UserError(f"--format is {format!r}, expected one of {', '.join(formats)}: choose one of these.")
    path = Path(target).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another path, or remove it.")
    if format == "big_vision" and path.suffix != ".npz":
        raise UserError(f"{path} does not end in .npz, as big_vision's files do: rename it.")
    return path


def read(
    source: str, dtype: str | None = None, adapter: str | None = None, quantize: str | None = None
) -> PaliGemma | DualEncoder:
    """Returns the whole model at a local path, in `dtype` (None: the stored dtype; float32 for a run).

    `adapter` and `quantize` are passed to `loading.load`; they apply to checkpoints only.

    Raises:
      UserError: as `loading.load`, or the path names a single tower.
    """
    if dtype is None:
        dtype = "float32" if loading.is_run(source) else stored_dtype(source)
    options = {name: value for name, value in (("adapter", adapter), ("quantize", quantize)) if value is not None}
    model = loading.load(source, dtype, **options)
    if not isinstance(model, PaliGemma | DualEncoder):
        raise UserError(f"{source} is one tower, expected a whole model: leave out what follows the colon.")
    if isinstance(model, DualEncoder) and loading.is_run(source):  # its parameters are float32 for any compute dtype
        arrays = param_tree.flatten(model)
        return param_tree.assign(model, {path: array.astype(dtype) for path, array in arrays.items()})
    return model


def write(model: PaliGemma | DualEncoder, path: Path, format: str, source: str) -> None:
    """Writes a model (unquantised unless the format is orbax) and the source's tokenizer files beside it."""
    tokenizer = source if tokenizer_files(source) else None
    if format == "hugging_face":
        save_hugging_face(model, path, tokenizer)
    elif format == ORBAX:
        save_orbax(model, path, tokenizer)
    else:
        save_big_vision(model, path)
        for file in tokenizer_files(source):
            if file.name in (MODEL, SIGLIP_MODEL) and not (path.parent / file.name).exists():
                shutil.copyfile(file, path.parent / file.name)


def plain(model: PaliGemma | DualEncoder) -> PaliGemma | DualEncoder:
    """Returns the model with adapters merged and kernels dequantised; prints a line if any kernel was quantised."""
    if isinstance(model, PaliGemma) and attached_to(model):
        return _merged(model)
    if not is_quantized(model):
        return model
    _print_dequantised(model)
    return cast(PaliGemma | DualEncoder, dequantize(model))


def _merged(model: PaliGemma) -> PaliGemma:
    """Returns the model with adapters merged; prints how much that moves logits if it was quantised."""
    if not is_quantized(model):
        return merge(model)
    unmerged = nnx.clone(model)  # shares all arrays; merging replaces those that change
    merged = cast(PaliGemma, dequantize(merge(model)))
    _print_dequantised(unmerged)
    gap = largest_logit_gap(unmerged, merged, **probe_inputs(merged))
    print(f"merged the adapters in float32: logits move by at most {gap:.2g} on random inputs")
    return merged


def _print_dequantised(model: PaliGemma | DualEncoder) -> None:
    print(f"dequantised: {describe(model)}; the rounding of quantisation is not undone")


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("format", None, ", ".join(CHOICES), flag_values=values)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; as the source has it", flag_values=values)
    flags.DEFINE_string("quantize", None, "nf4, int8 or int4, of orbax", flag_values=values)
    flags.DEFINE_string("push", None, "owner/name on the Hugging Face Hub", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Runs `convert` from the command line."""
    expected = f"SRC DST --format={'|'.join(CHOICES)}"
    (source, target), values = command_line.parse(argv, __doc__ or "", _flags, expected)
    if values.format is None:
        raise UserError(f"found no --format, expected {expected}")
    path = convert(source, target, values.format, values.dtype, values.quantize)
    print(f"wrote {path}")
    if values.push:
        print(f"pushed to {hub.push(path, values.push)}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
