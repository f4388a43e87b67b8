"""Adds an adapter's parameters to a layer and removes them again, for all methods.

Models contain no adapter code. An adapter is a subclass of the layer that it changes; `ADDS` names its attributes:

  class LoraProjection(Projection):
      ADDS = ("lora_a", "lora_b", ...)

`attach` turns a layer of a model into an instance of the subclass, in place, and `detach` turns it back. The layer
keeps its place in the model, so its parameters keep their paths ("q_proj/kernel"), and those of the adapter are beside
them ("q_proj/lora_a"). method.py has the protocol of the methods, which attach such layers to a model.
"""

from typing import Any, ClassVar, Protocol, TypeVar, cast

from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)


class Adapter(Protocol):
    """A subclass of a layer; its first base class is the layer without the adapter."""

    ADDS: ClassVar[tuple[str, ...]]


def attach(layer: nnx.Module, adapter: type[Layer], **attributes: Any) -> Layer:
    """Makes a layer an instance of `adapter`, in place, with the attributes that it adds.

    Args:
      layer: an instance of the base class of `adapter`.
      adapter: see `Adapter`.
      attributes: a value for each name of `adapter.ADDS`: Variables, modules, `nnx.data(None)` for an absent one, or
        settings.

    Raises:
      TypeError: the layer is of another class, or the attributes are not those of `adapter`.
    """
    names = cast(type[Adapter], adapter).ADDS
    if type(layer) is not _base_class(adapter) or set(attributes) != set(names):
        raise TypeError(
            f"{adapter.__name__} with {sorted(attributes)} is to extend a {type(layer).__name__}, "
            f"expected a {_base_class(adapter).__name__} and {sorted(names)}."
        )
    object.__setattr__(layer, "__class__", adapter)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return cast(Layer, layer)


def detach(layer: nnx.Module, adapter: type[nnx.Module]) -> nnx.Module:
    """Undoes `attach`, in place; a layer that is not an instance of `adapter` is returned unchanged."""
    if type(layer) is not adapter:
        return layer
    names = cast(type[Adapter], adapter).ADDS
    for name in names:
        delattr(layer, name)
    # NNX keeps a table of the attributes that hold data, in which a layer without the adapter does not list these.
    table = layer._pytree__nodes
    base_nodes = {name: is_data for name, is_data in table.items() if name not in names}
    object.__setattr__(layer, "_pytree__nodes", type(table)(base_nodes))
    object.__setattr__(layer, "__class__", _base_class(adapter))
    return layer


def _base_class(adapter: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the layer class that an adapter extends."""
    return adapter.__bases__[0]
