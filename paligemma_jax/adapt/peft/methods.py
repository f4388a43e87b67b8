"""Methods of parameter-efficient fine-tuning by name (`adapter.name`): attaching, trained parameters, merging.

LoRA has more options and is not among them, see adapt/lora/adapter.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from flax import nnx

from paligemma_jax.adapt.lora import adapter as lora
from paligemma_jax.adapt.peft import bitfit, bottleneck, diff_pruning, last_layers, prefixes
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError

# Methods that can change any module are typed with nnx.Module; all of them are called with a PaliGemma.
Attach = Callable[[PaliGemma, Any, Any, nnx.Rngs], nnx.Module]
Detach = Callable[[PaliGemma], nnx.Module]


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """A method of parameter-efficient fine-tuning.

    Attributes:
      attach: called with the model, `size`, `targets` and rngs, of which it uses those that it has.
      trainable: pattern of the parameters that train; None means `targets`.
      size: the meaning of `adapter.size` and its default; None if the method has no size.
      targets: default pattern of modules or parameters; None if the method has no targets.
      detach: restores the base, in place; None if the method trains parameters of the base.
    """

    attach: Attach
    trainable: str | None
    size: tuple[str, int] | None = None
    targets: str | None = None
    detach: Detach | None = None


METHODS = {
    "bottleneck": PeftMethod(
        lambda model, size, targets, rngs: bottleneck.attach_bottlenecks(model, size, rngs=rngs),
        bottleneck.TRAINABLE,
        ("width", 16),
        detach=bottleneck.detach_bottlenecks,
    ),
    "prefix": PeftMethod(
        lambda model, size, targets, rngs: prefixes.attach_prefix(model, size, rngs=rngs),
        prefixes.TRAINABLE_PREFIX,
        ("length", 16),
        detach=prefixes.detach_prefix,
    ),
    "prompt": PeftMethod(
        lambda model, size, targets, rngs: prefixes.attach_prompt(model, size, rngs=rngs),
        prefixes.TRAINABLE_PROMPT,
        ("length", 16),
        detach=prefixes.detach_prompt,
    ),
    "bitfit": PeftMethod(
        lambda model, size, targets, rngs: bitfit.prepare_bitfit(model, targets),
        None,
        targets=bitfit.SCALES_AND_BIASES,
    ),
    "diff_pruning": PeftMethod(
        lambda model, size, targets, rngs: diff_pruning.attach_diff(model, targets),
        diff_pruning.TRAINABLE,
        targets=r"decoder/.*_proj",
        detach=diff_pruning.detach_diff,
    ),
    "last_layers": PeftMethod(
        lambda model, size, targets, rngs: last_layers.split_last_layers(model, size),
        last_layers.TRAINABLE,
        ("number of layers", 1),
    ),
}
"""Methods by the names of `adapter.name`, which is "lora" or "none" otherwise."""

DETACH: dict[str, Detach] = {"lora": lora.detach_lora}
DETACH |= {name: method.detach for name, method in METHODS.items() if method.detach is not None}
"""Functions that restore the base in place, of the methods that do not train its parameters."""


def base_of(model: PaliGemma, name: str) -> PaliGemma:
    """Returns the model without the adapter of a method in `DETACH`, as a new module that shares the arrays."""
    return cast(PaliGemma, DETACH[name](nnx.clone(model)))


def merge(model: PaliGemma) -> PaliGemma:
    """Adds differences to their kernels and moves last layers back into their stack, in place.

    A model without these is returned unchanged; for LoRA see merge_lora.

    Raises:
      UserError: the model has parts that cannot be merged: a prefix, a soft prompt, or bottleneck adapters.
    """
    decoder = model.decoder
    has_part = {
        "a prefix": isinstance(decoder.layers.self_attn, prefixes.PrefixAttention),
        "a soft prompt": isinstance(decoder, prefixes.PromptedGemma),
        "bottleneck adapters": isinstance(decoder.layers, bottleneck.BottleneckBlock),
    }
    not_mergeable = [part for part, present in has_part.items() if present]
    if not_mergeable:
        raise UserError(
            f"the model has {not_mergeable[0]}, which no plain model can hold, expected LoRA, diff pruning or trained "
            "layers: keep it as a run of ours, or export its adapter alone."
        )
    if isinstance(decoder, last_layers.SplitGemma):
        last_layers.join_last_layers(model)
    if diff_pruning.diff_projections(model):
        diff_pruning.merge_diff(model)
    return model
