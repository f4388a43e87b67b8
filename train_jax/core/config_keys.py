"""Declares config keys, each in one place: a field of a dataclass with its default, meaning, range and role.

    @dataclasses.dataclass(frozen=True)
    class Loss:
        name: str = key("sigmoid", "the loss", choices=("sigmoid", "softmax"), architecture=True)
        chunk_size: int = key(256, "texts per chunk", minimum=1, resume_safe=True)
        negatives: int | None = key(None, "negatives per image; None = all", minimum=1)

    @dataclasses.dataclass(frozen=True)
    class Keys:
        seed: int = key(0, "of all randomness", minimum=0)
        loss: Loss = section(Loss)

`config_dict(Keys)` is the ConfigDict of the defaults, `declared(Keys)` describes each key by its dotted name. The
validation of a config, the keys that a resumed run may change and the tables of docs/config.md are made from
these.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from train_jax.core.errors import UserError, quoted


@dataclasses.dataclass(frozen=True)
class Key:
    """The declaration of a config key.

    Attributes:
      help: meaning of the value, in a phrase.
      choices: allowed values; None = any.
      minimum, maximum: smallest and largest allowed value; None = no bound.
      above, below: exclusive bounds; None = no bound.
      resume_safe: whether a resumed run may change it, as it does not change the mathematics.
      architecture: whether it shapes the model, so that an evaluation of a run may not change it.
      default: value of a config that does not set it.
      made: whether the default depends on the machine.
      value_type: type of the value; a config may hold a whole number for float.
      optional: the value may be None.
    """

    help: str
    choices: tuple[Any, ...] | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    resume_safe: bool = False
    architecture: bool = False
    default: Any = None
    made: bool = False
    value_type: type = object
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        """Checks a value that is of the key's type.

        Raises:
          UserError: the value is not one of the choices, or out of range.
        """
        if value is None and self.optional:
            return
        if self.choices is not None and value not in self.choices:
            near = difflib.get_close_matches(str(value), map(str, self.choices), n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"config.{name}={quoted(value)}, expected one of {self.values()}: change it{hint}")
        if not self._in_range(value):
            raise UserError(f"config.{name}={value}, expected {self.values()}: change it")

    def _in_range(self, value: Any) -> bool:
        """Returns whether all bounds hold; False for NaN."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def values(self) -> str:
        """Returns the allowed values as text: "sigmoid, softmax" or "a number from 0 to 1"; "" if all are allowed."""
        if self.choices is not None:
            return ", ".join(str(choice) or "''" for choice in self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"a number from {self.minimum} to {self.maximum}"
        parts = [] if self.minimum is None else [f"{self.minimum} or more"]
        parts += [f"{self.maximum} or less"] if self.maximum is not None else []
        parts += [f"a number above {self.above}"] if self.above is not None else []
        parts += [f"below {self.below}"] if self.below is not None else []
        return " and ".join(parts)


def key(default: Any, help: str, *, choices: Iterable[Any] | None = None, **known: Any) -> Any:
    """Declares a field as a config key.

    Args:
      default: the default value, or a function that returns it if it depends on the machine. The annotation of the
        field is the type; `| None` makes the key optional.
      help: meaning of the value.
      choices: allowed values, in the order of the documentation.
      **known: minimum, maximum, above, below, resume_safe and architecture of `Key`.
    """
    entry = Key(help, None if choices is None else tuple(choices), **known)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"key": dataclasses.replace(entry, made=True)})
    return dataclasses.field(default=default, metadata={"key": entry})


def section(make: Callable[[], Any], **known: bool) -> Any:
    """Declares a field as a section of keys: an instance of a dataclass, which `make()` returns.

    Args:
      make: the dataclass, or a function that returns an instance with other defaults.
      **known: resume_safe, architecture: of all keys in the section.
    """
    return dataclasses.field(default_factory=make, metadata={"section": known})


def config_dict(keys: Any) -> ConfigDict:
    """Returns the defaults of a dataclass of keys, or the values of an instance, as a ConfigDict.

    A key whose annotation admits None is a typed placeholder, which may be None whatever it holds now.
    """
    instance = keys() if isinstance(keys, type) else keys
    hints = typing.get_type_hints(type(instance))
    config = ConfigDict()
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            config[field.name] = config_dict(value)
            continue
        kind, optional = _kind(field.name, hints[field.name])
        if optional:
            config[field.name] = placeholder(kind)
        if value is not None:
            config[field.name] = value
    return config


def declared(keys: Any, prefix: str = "", **known: bool) -> dict[str, Key]:
    """Returns the declarations of all keys of a dataclass or an instance of it, by dotted name.

    A field without `key(...)`, as in a dataclass that is also used elsewhere, is a key with a type and a default.
    """
    instance = keys() if isinstance(keys, type) else keys
    hints = typing.get_type_hints(type(instance))
    result: dict[str, Key] = {}
    for field in dataclasses.fields(instance):
        name, value = f"{prefix}{field.name}", getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            result |= declared(value, f"{name}.", **{**known, **field.metadata.get("section", {})})
            continue
        kind, optional = _kind(field.name, hints[field.name])
        entry = field.metadata.get("key", Key(""))
        result[name] = dataclasses.replace(entry, default=value, value_type=kind, optional=optional, **known)
    return result


def check_values(keys: Mapping[str, Key], values: Mapping[str, Any]) -> None:
    """Checks values by dotted key; keys without a value are skipped.

    Raises:
      UserError: for the first value that is not one of its key's choices, or out of range.
    """
    for name, entry in keys.items():
        if name in values:
            entry.check(name, values[name])


def _kind(name: str, hint: Any) -> tuple[type, bool]:
    """Returns the type of an annotation and whether it admits None: (int, True) of `int | None`.

    `int | float` is float, which admits whole numbers.

    Raises:
      UserError: the annotation is no class, nor one class and None.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = set(typing.get_args(hint)) if union else {hint}
    kinds = parts - {type(None)}
    kind = float if kinds == {int, float} else next(iter(kinds), None)
    kind = typing.get_origin(kind) or kind
    if not isinstance(kind, type) or kind is Any or (len(kinds) > 1 and kind is not float):
        raise UserError(f"the key {name} is annotated {hint}, expected one type, with `| None` or without: change it")
    return kind, parts != kinds
