"""Names of our LoRA arrays in a peft file: modules have the names that transformers gives them in memory.

peft saves `base_model.model.<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, with DoRA,
`.lora_magnitude_vector` (out,). The module's name is the one in memory, which changed with transformers' releases; here
the names in checkpoints on disk (weights/hugging_face/paligemma_names.py), which did not change, are used for all.
"""

import dataclasses
import re

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import depth, projections
from paligemma_jax.weights.hugging_face.folder import canonical
from paligemma_jax.weights.hugging_face.paligemma_names import TOWER, rows
from paligemma_jax.weights.name_table import Row

DECODER, PROJECTOR = "language_model.model.", "multi_modal_projector."
# Prefixes in memory of decoder, tower and projector, by the first release of transformers that uses them.
RELEASES = {
    "5": ("model.language_model.", "model.vision_tower.", f"model.{PROJECTOR}"),
    "4.52": ("model.language_model.", f"model.{TOWER}", f"model.{PROJECTOR}"),
    "4.41": (DECODER, TOWER, PROJECTOR),
}
PREFIX = "base_model.model."
KEY = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector)(\.weight)?")
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def in_memory(name: str, release: str) -> str:
    """Returns the name of a module in a release, from the one on disk."""
    for on_disk, prefix in zip((DECODER, TOWER, PROJECTOR), RELEASES[release], strict=True):
        if name.startswith(on_disk):
            return prefix + name.removeprefix(on_disk)
    raise ValueError(f"{name} is in no part of a PaliGemma.")


def module_of(key: str) -> str | None:
    """Returns the module in memory that a key of a file belongs to, None if it is not a LoRA key."""
    match = KEY.fullmatch(key)
    return match["module"] if match else None


def disk_name(key: str) -> str:
    """Returns a file's key with the module's name on disk, in one spelling; other keys are unchanged."""
    match = KEY.fullmatch(key)
    return f"{canonical(match['module'])}.{match['part']}" if match else key


@dataclasses.dataclass(frozen=True)
class Slot:
    """One module of transformers' that may have an adapter: one layer of one of our projections.

    Attributes:
      path: the projection.
      layer: its number, None if the projection is not stacked.
      name: the module's name on disk.
      in_shape, out_shape: the projection's.
      conv: whether the module is a convolution, as the patch embedding is.
    """

    path: str
    layer: int | None
    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    conv: bool

    def rows(self, dora: bool) -> dict[str, Row]:
        """Returns the layout of its arrays on their side, by our leaf's name."""
        contracted = len(self.in_shape)
        a = Row(f"{self.path}/lora_a", f"{self.name}.{A}", "conv" if self.conv else "linear", contracted)
        table = {"lora_a": a, "lora_b": Row(f"{self.path}/lora_b", f"{self.name}.{B}", "linear")}
        if dora:
            table["lora_magnitude"] = Row(f"{self.path}/lora_magnitude", f"{self.name}.{MAGNITUDE}", "flat")
        return table

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of its arrays here, by our leaf's name."""
        a, b = (*self.in_shape, rank), (rank, *self.out_shape)
        return {"lora_a": a, "lora_b": b, "lora_magnitude": self.out_shape}


def slots(model: PaliGemma) -> list[Slot]:
    """Returns every module that may have an adapter, in the order of the name table."""
    modules, result = projections(model), []
    for row in rows(model.config.decoder.post_norms):
        path = row.ours.removesuffix("/kernel")
        if path not in modules or path == row.ours:
            continue
        module, name = modules[path], row.theirs.removesuffix(".weight")
        layers = depth(module)
        for layer in range(layers) if layers is not None else [None]:
            shapes = module.in_shape, module.out_shape
            result.append(Slot(path, layer, name.format(i=layer), *shapes, row.layout == "conv"))
    return result
