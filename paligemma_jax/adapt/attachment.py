"""How a method's parameters come to stand beside a layer's own, and go again: the one mechanism of all adapters.

Models know no adapter. A method is a subclass of the layer that it changes, with attributes of its own in `ADDS`:

  class LoraProjection(Projection):
      ADDS = ("lora_a", "lora_b", ...)

`attach` turns a layer of a model into an instance of the subclass, in place, and `detach` turns it back. The layer
stays where it is, so its parameters keep their paths ("q_proj/kernel"), and the method's lie beside them
("q_proj/lora_a").
"""

from typing import Any, ClassVar, Protocol, TypeVar

from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)


class Adapted(Protocol):
    """A layer class of a method; its first base class is the layer without it."""

    ADDS: ClassVar[tuple[str, ...]]


def attach(layer: nnx.Module, kind: type[Layer], **attributes: Any) -> Layer:
    """Makes a layer an instance of `kind`, in place, with the attributes that it adds.

    Args:
      layer: an instance of the class that `kind` extends.
      kind: see `Adapted`.
      attributes: a value for each name of `kind.ADDS`: Variables and modules, `nnx.data(None)` in place of one that is
        absent, or settings.

    Raises:
      TypeError: the layer is of another class, or the attributes are not those of `kind`.
    """
    if type(layer) is not kind.__base__ or set(attributes) != set(kind.ADDS):
        raise TypeError(
            f"{kind.__name__} with {sorted(attributes)} is to extend a {type(layer).__name__}, "
            f"expected a {kind.__base__.__name__} and {sorted(kind.ADDS)}."
        )
    object.__setattr__(layer, "__class__", kind)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def detach(layer: nnx.Module, kind: type[nnx.Module]) -> nnx.Module:
    """Undoes `attach`, in place; a layer that is no instance of `kind` stays as it is."""
    if type(layer) is not kind:
        return layer
    for name in kind.ADDS:
        delattr(layer, name)
    # NNX keeps a table of which attributes hold data; a layer that never had these does not name them.
    table = layer._pytree__nodes
    rest = {name: is_data for name, is_data in table.items() if name not in kind.ADDS}
    object.__setattr__(layer, "_pytree__nodes", type(table)(rest))
    object.__setattr__(layer, "__class__", kind.__base__)
    return layer
