"""The methods of parameter-efficient fine-tuning by name: how each is attached, what trains, how it is merged.

LoRA has options of its own and stays in adapt/lora/adapter.py; here are the others, so that a run names one by
`adapter.name`.
"""

import dataclasses
from collections.abc import Callable

from flax import nnx

from paligemma_jax.adapt.lora import adapter as lora
from paligemma_jax.adapt.peft import bitfit, bottleneck, diff_pruning, last_layers, prefixes
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError

Attach = Callable[[PaliGemma, int, str, nnx.Rngs], PaliGemma]
Detach = Callable[[PaliGemma], PaliGemma]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
      attach: called with the model, `size`, `targets` and rngs, of which it takes what it needs.
      trainable: pattern of what trains; None: `targets` itself.
      size: what `adapter.size` is of this method, and its default; None where it has none.
      targets: default pattern, of modules or parameters; None where it has none.
      detach: makes the base of it again, in place; None where parameters of the base train.
    """

    attach: Attach
    trainable: str | None
    size: tuple[str, int] | None = None
    targets: str | None = None
    detach: Detach | None = None


METHODS = {
    "bottleneck": Method(
        lambda model, size, targets, rngs: bottleneck.attach_bottlenecks(model, size, rngs=rngs),
        bottleneck.TRAINABLE,
        ("width", 16),
        detach=bottleneck.detach_bottlenecks,
    ),
    "prefix": Method(
        lambda model, size, targets, rngs: prefixes.attach_prefix(model, size, rngs=rngs),
        prefixes.TRAINABLE_PREFIX,
        ("length", 16),
        detach=prefixes.detach_prefix,
    ),
    "prompt": Method(
        lambda model, size, targets, rngs: prefixes.attach_prompt(model, size, rngs=rngs),
        prefixes.TRAINABLE_PROMPT,
        ("length", 16),
        detach=prefixes.detach_prompt,
    ),
    "bitfit": Method(
        lambda model, size, targets, rngs: bitfit.prepare_bitfit(model, targets),
        None,
        targets=bitfit.SCALES_AND_BIASES,
    ),
    "diff_pruning": Method(
        lambda model, size, targets, rngs: diff_pruning.attach_diff(model, targets),
        diff_pruning.TRAINABLE,
        targets=r"decoder/.*_proj",
        detach=diff_pruning.detach_diff,
    ),
    "last_layers": Method(
        lambda model, size, targets, rngs: last_layers.split_last_layers(model, size),
        last_layers.TRAINABLE,
        ("number of layers", 1),
    ),
}
"""By the names that `adapter.name` takes beside "lora" and "none"."""

DETACH: dict[str, Detach] = {"lora": lora.detach_lora}
DETACH |= {name: method.detach for name, method in METHODS.items() if method.detach is not None}
"""By name, of the methods that leave the base's parameters as they are: makes the base again, in place."""


def base_of(model: PaliGemma, name: str) -> PaliGemma:
    """The model without the adapters of a method in `DETACH`: a module of its own over the same arrays, none copied."""
    return DETACH[name](nnx.clone(model))


def merge(model: PaliGemma) -> PaliGemma:
    """A plain model again: differences added to their kernels, last layers put back into their stack, in place.

    A model that has neither is returned as it is; LoRA is merged by merge_lora.

    Raises:
      UserError: the model has learned parts that no plain one can hold: prefixes, a soft prompt, or bottlenecks.
    """
    decoder = model.decoder
    held = {
        "a prefix": isinstance(decoder.layers.self_attn, prefixes.PrefixAttention),
        "a soft prompt": isinstance(decoder, prefixes.PromptedGemma),
        "bottleneck adapters": isinstance(decoder.layers, bottleneck.BottleneckBlock),
    }
    found = [what for what, present in held.items() if present]
    if found:
        raise UserError(
            f"the model has {found[0]}, which no plain model can hold, expected LoRA, diff pruning or trained layers: "
            "keep it as a run of ours, or export its adapter alone."
        )
    if isinstance(decoder, last_layers.SplitGemma):
        last_layers.join_last_layers(model)
    return diff_pruning.merge_diff(model) if diff_pruning.kernels(model) else model
