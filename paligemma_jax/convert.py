"""Checkpoints from one format to another: python -m paligemma_jax.convert SRC DST --format=FORMAT [--push=REPO]

SRC       whatever pg.load reads, of a PaliGemma, SigLIP or CLIP: a Hugging Face folder, hf://owner/name, a big_vision
          .npz, a folder of --format=orbax, "tiny", or the workdir of a run, whose adapters are merged; a quantised base
          is dequantised for that.
          Quantised kernels of a folder of --format=orbax stay as they are in another of that format.
DST       a folder that does not exist yet (a file ending in .npz for big_vision).
--format  hugging_face (transformers opens it), big_vision (a .npz), orbax (fastest to load here), or peft: the LoRA of
          a run alone, unmerged, as peft opens it.
--dtype   float32, bfloat16 or float16; as SRC has it when not given (a run's: float32).
--quantize  nf4, int8 or int4: of --format=orbax, so that a quantised base is read as it is from then on.
--push    owner/name: uploads DST to the Hugging Face Hub as well.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from paligemma_jax import loading
from paligemma_jax.adapt.lora.adapter import lora_projections, merge_lora
from paligemma_jax.adapt.lora.merge_quantized import merge_quantized
from paligemma_jax.adapt.peft import methods as family
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
FORMATS = ("hugging_face", "big_vision", ORBAX)  # of whole models
PEFT = "peft"
CHOICES = (*FORMATS, PEFT)


def convert(source: str, target: str, format: str, dtype: str | None = None, quantize: str | None = None) -> Path:
    """Reads a model and writes it in another format, its tokenizer's files beside it where the source has them.

    Args:
      source, target, format, dtype, quantize: see the module.

    Returns:
      Where it was written.

    Raises:
      UserError: an unknown format, a target that exists, or whatever is wrong with the source.
    """
    place = checked_place(target, format, CHOICES)
    if quantize is not None and format != ORBAX:
        raise UserError(f"--quantize is {quantize} beside --format={format}, expected {ORBAX}, which alone keeps it.")
    if hub.is_remote(source):
        source = str(hub.download(source))
    model = read(source, dtype, quantize=quantize)
    if format == PEFT and isinstance(model, DualEncoder):
        raise UserError(f"{source} is a dual encoder, which has no adapters for --format=peft: choose another format.")
    if format == PEFT:
        base = loading.run_config(source).model.path if loading.is_run(source) else source
        save_peft(model, place, base=base)
    else:
        kept = format == ORBAX and not _is_adapted(model)
        write(_joined(model) if kept else plain(model), place, format, source)
    return place


def checked_place(target: str, format: str, formats: Sequence[str] = FORMATS) -> Path:
    """Where a model of this format is to be written.

    Raises:
      UserError: an unknown format, a target that exists, or one that big_vision's files cannot have.
    """
    if format not in formats:
        raise UserError(f"--format is {format!r}, expected one of {', '.join(formats)}: choose one of these.")
    place = Path(target).expanduser()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise UserError(f"{place} exists already: choose a place that does not, or remove it.")
    if format == "big_vision" and place.suffix != ".npz":
        raise UserError(f"{place} does not end in .npz, as big_vision's files do: rename it.")
    return place


def read(
    source: str, dtype: str | None = None, adapter: str | None = None, quantize: str | None = None
) -> PaliGemma | DualEncoder:
    """The whole model at a place on this machine, in the dtype it is stored in (a run: float32) unless given.

    `adapter` and `quantize` are as of `loading.load`, of a checkpoint alone.

    Raises:
      UserError: as `loading.load`, or one tower alone.
    """
    if dtype is None:
        dtype = "float32" if loading.is_run(source) else stored_dtype(source)
    options = {name: value for name, value in (("adapter", adapter), ("quantize", quantize)) if value is not None}
    model = loading.load(source, dtype, **options)
    if not isinstance(model, PaliGemma | DualEncoder):
        raise UserError(f"{source} is one tower, expected a whole model: leave out what follows the colon.")
    if isinstance(model, DualEncoder) and loading.is_run(source):  # which trains in float32, whatever it computes in
        arrays = param_tree.flatten(model)
        return param_tree.assign(model, {path: array.astype(dtype) for path, array in arrays.items()})
    return model


def write(model: PaliGemma | DualEncoder, place: Path, format: str, source: str) -> None:
    """Writes a model (plain, but for orbax), and beside it the tokenizer's files of the source, where it has them."""
    tokenizer = source if tokenizer_files(source) else None
    if format == "hugging_face":
        save_hugging_face(model, place, tokenizer)
    elif format == ORBAX:
        save_orbax(model, place, tokenizer)
    else:
        save_big_vision(model, place)
        for file in tokenizer_files(source):
            if file.name in (MODEL, SIGLIP_MODEL) and not (place.parent / file.name).exists():
                shutil.copyfile(file, place.parent / file.name)


def plain(model: PaliGemma | DualEncoder) -> PaliGemma | DualEncoder:
    """The model with its adapters merged and its kernels dequantised; says so where they were quantised."""
    model = _joined(model)
    adapted = _is_adapted(model)
    if not is_quantized(model):
        return merge_lora(model) if adapted else model
    print(f"dequantised: {describe(model)}; what rounding lost stays lost")
    if not adapted:
        return dequantize(model)
    merged, gap = merge_quantized(model)
    print(f"merged the adapters in float32: logits move by at most {gap:.2g} on random inputs")
    return merged


def _joined(model: PaliGemma | DualEncoder) -> PaliGemma | DualEncoder:
    """The model without what methods other than LoRA have added."""
    return family.merge(model) if isinstance(model, PaliGemma) else model


def _is_adapted(model: PaliGemma | DualEncoder) -> bool:
    return bool(lora_projections(model))


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("format", None, ", ".join(CHOICES), flag_values=values)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; as the source has it", flag_values=values)
    flags.DEFINE_string("quantize", None, "nf4, int8 or int4, of orbax", flag_values=values)
    flags.DEFINE_string("push", None, "owner/name on the Hugging Face Hub", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Command line of `convert`."""
    expected = f"SRC DST --format={'|'.join(CHOICES)}"
    places, values = command_line.parse(argv, __doc__, _flags, expected)
    if values.format is None:
        raise UserError(f"found no --format, expected {expected}")
    place = convert(*places, values.format, values.dtype, values.quantize)
    print(f"wrote {place}")
    if values.push:
        print(f"pushed to {hub.push(place, values.push)}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
