"""Methods of parameter-efficient fine-tuning of a PaliGemma, by the names of `adapter.name`."""

from flax import nnx

from paligemma_jax.adapt.lora.method import Lora
from paligemma_jax.adapt.method import Method
from paligemma_jax.adapt.peft.bitfit import BitFit
from paligemma_jax.adapt.peft.bottleneck import Bottlenecks
from paligemma_jax.adapt.peft.diff_pruning import DiffPruning
from paligemma_jax.adapt.peft.last_layers import LastLayers
from paligemma_jax.adapt.peft.prefixes import Prefix, Prompt
from paligemma_jax.models.paligemma import PaliGemma

METHODS: dict[str, type[Method[PaliGemma]]] = {
    method.name: method for method in (Lora, Bottlenecks, Prefix, Prompt, BitFit, DiffPruning, LastLayers)
}
"""The methods; an instance is a method with its options."""

KEEP_BASE = tuple(name for name, method in METHODS.items() if method.keeps_base)
"""Names of the methods that do not train parameters of the base."""


def base_of(model: PaliGemma, name: str) -> PaliGemma:
    """Returns the model without the adapter of a method in `KEEP_BASE`, as a new module that shares the arrays."""
    return METHODS[name].detach(nnx.clone(model))


def attached_to(model: nnx.Module) -> list[type[Method[PaliGemma]]]:
    """Returns the methods that have modules in a model; a method that trains parameters of the base has none."""
    return [method for method in METHODS.values() if method.is_attached(model)]


def merge(model: PaliGemma) -> PaliGemma:
    """Makes a model plain by merging every method that is attached to it, in place.

    Raises:
      UserError: a method that cannot be merged.
    """
    for method in attached_to(model):
        model = method.merge(model)
    return model
