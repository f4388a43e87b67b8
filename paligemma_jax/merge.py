"""Merges adapters into their base: python -m paligemma_jax.merge RUN_OR_BASE [--adapter=FOLDER] DST.

RUN_OR_BASE  the workdir of one of our runs, or the base that --adapter was trained on: any path that pg.load reads.
--adapter    a folder as peft or a run of ours saves it, or hf://owner/name; not for a run, which has its own adapters.
DST          a folder that does not exist yet, or a file ending in .npz.
--format     hugging_face (opened by transformers), big_vision (a .npz) or orbax; default: from the ending of DST.
--dtype      float32, bfloat16 or float16; default: the dtype of the base (float32 for a run).

Ranks, scales and the other settings are read from the run or the adapter. Kernels are merged in float32 and rounded
once; quantised kernels are dequantised to the values that the adapter was trained with. The command prints the largest
change of a logit that merging causes, measured on a noise image and random tokens.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from paligemma_jax import loading
from paligemma_jax.adapt.lora.adapter import largest_logit_gap
from paligemma_jax.adapt.lora.merge_quantized import probe_inputs
from paligemma_jax.adapt.peft.methods import attached_to
from paligemma_jax.convert import FORMATS, checked_target, plain, read, write
from paligemma_jax.files import hub
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.config import command_line
from train_jax.core import param_tree
from train_jax.core.errors import UserError


def merge(
    source: str, target: str, adapter: str | None = None, format: str | None = None, dtype: str | None = None
) -> tuple[Path, float]:
    """Reads a base and its adapter, merges them, and writes a plain model with the source's tokenizer files.

    Args:
      source, target, adapter, format, dtype: see the module.

    Returns:
      The path that was written, and the largest difference of a logit from the unmerged model.

    Raises:
      UserError: no adapter, a target that exists, or a source or adapter that cannot be read.
    """
    if adapter is None and not loading.is_run(source):
        raise UserError(f"{source} is no run and has no adapters, expected --adapter=FOLDER beside a base.")
    format = format or ("big_vision" if target.endswith(".npz") else "hugging_face")
    path = checked_target(target, format)
    if hub.is_remote(source):
        source = str(hub.download(source))
    model = read(source, dtype, adapter)
    if not isinstance(model, PaliGemma) or not attached_to(model):
        raise UserError(f"{source} has no adapters to merge: write it with paligemma_jax.convert.")
    unmerged = param_tree.merge(*param_tree.split(model))  # shares all arrays; merging replaces those that change
    model = plain(model)
    assert isinstance(model, PaliGemma), "merging keeps the kind of model"
    gap = largest_logit_gap(unmerged, model, **probe_inputs(model))
    del unmerged
    write(model, path, format, source)
    return path, gap


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("adapter", None, "a folder as peft saves it", flag_values=values)
    flags.DEFINE_string("format", None, ", ".join(FORMATS), flag_values=values)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; as the base has it", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Runs `merge` from the command line."""
    (source, target), values = command_line.parse(argv, __doc__ or "", _flags, "RUN_OR_BASE [--adapter=FOLDER] DST")
    path, gap = merge(source, target, values.adapter, values.format, values.dtype)
    print(f"wrote {path}; merging changed logits by {gap:.2g} at most")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
