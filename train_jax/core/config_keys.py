"""Declares config keys, each in one place: a field of a dataclass with its default, meaning, range and role.

    @dataclasses.dataclass(frozen=True)
    class Loss:
        name: str = key("sigmoid", "the loss", choices=("sigmoid", "softmax"), architecture=True)
        chunk_size: int = key(256, "texts per chunk", minimum=1, resume_safe=True)
        layers: tuple[int, ...] = key((), "numbers of layers; () = all", minimum=0)
        negatives: int | None = key(None, "negatives per image; None = all", minimum=1)

    @dataclasses.dataclass(frozen=True)
    class Keys:
        seed: int = key(0, "seed of all random numbers", minimum=0)
        loss: Loss = section(Loss)

`config_dict(Keys)` is the ConfigDict of the defaults, `declared(Keys)` describes each key by its dotted name. The
validation of a config, the keys that a resumed run may change and the tables of docs/config.md are made from
these. A number is finite, and a whole number fits into 32 bits, unless its key declares another `maximum`. The choices
and bounds of a tuple, such as `tuple[int, ...]`, are those of its elements.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from train_jax.core.errors import UserError, quoted

WHOLE_MAX = 2**31 - 1
"""Largest whole number of a key without `maximum`: JAX's integers have 32 bits."""

FLOAT_MAX = 3.4028234663852886e38
"""Largest number of other keys without `maximum`: larger ones are infinite in float32."""

NOUNS = {int: "whole numbers", float: "numbers", str: "strings"}
"""What error messages and tables call the elements of a tuple, by type."""


@dataclasses.dataclass(frozen=True)
class Key:
    """The declaration of a config key.

    Attributes:
      help: meaning of the value, in a phrase.
      choices: allowed values; None = any.
      minimum, maximum: smallest and largest allowed value; None = the largest magnitude of the type, see FLOAT_MAX.
      above, below: exclusive bounds; None = no bound.
      resume_safe: whether a resumed run may change it, as it does not change the mathematics.
      architecture: whether it shapes the model, so that an evaluation of a run may not change it.
      default: value of a config that does not set it.
      made: whether the default depends on the machine.
      value_type: type of the value; a config may hold a whole number for float.
      item_type: type of a tuple's elements, whose choices and bounds the above are; None = the value is no tuple, or a
        tuple whose elements are not checked here.
      length: number of a tuple's elements; None = any.
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
    item_type: type | None = None
    length: int | None = None
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        """Checks a value that is of the key's type.

        Raises:
          UserError: the value, or an element of a tuple, is not one of the choices, or out of range; or the tuple has
            another length or elements of another type.
        """
        if value is None and self.optional:
            return
        items = (value,) if self.item_type is None else tuple(value or ())
        if self.choices is not None:
            for item in items:
                self._check_choice(name, item)
        valid = all(self._has_item_type(item) and self._in_range(item) for item in items)
        if not valid or self.length not in (None, len(items)):
            raise UserError(f"config.{name}={quoted(value)}, expected {self._expected(items)}: change it")

    def _check_choice(self, name: str, item: Any) -> None:
        """Raises UserError unless the item is one of the choices."""
        assert self.choices is not None
        if item not in self.choices:
            near = difflib.get_close_matches(str(item), map(str, self.choices), n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            verb, count = ("=", "one") if self.item_type is None else (" holds ", "some")
            expected = ", ".join(self._names())
            raise UserError(f"config.{name}{verb}{quoted(item)}, expected {count} of {expected}: change it{hint}")

    def _has_item_type(self, item: Any) -> bool:
        """Returns whether an element of a tuple has the declared type; other values are not checked here."""
        return self.item_type is None or has_type(item, self.item_type)

    @property
    def number_type(self) -> type | None:
        """The type of the value or of a tuple's elements, int or float; None if they are no numbers."""
        kind = self.item_type or self.value_type
        return kind if kind in (int, float) else None

    @property
    def _largest(self) -> int | float:
        """The largest magnitude where no bound is declared."""
        return WHOLE_MAX if self.number_type is int else FLOAT_MAX

    def _in_range(self, item: Any) -> bool:
        """Returns whether all bounds hold; False for NaN."""
        if self.number_type is None:
            return True
        low = -self._largest if self.minimum is None else self.minimum
        high = self._largest if self.maximum is None else self.maximum
        return (
            low <= item <= high
            and (self.above is None or item > self.above)
            and (self.below is None or item < self.below)
        )

    def _expected(self, items: Sequence[Any]) -> str:
        """Returns the allowed values as text, with the limit of the type if one of the items is beyond it."""
        text = self.values() or ("a whole number" if self.number_type is int else "a number")
        bounded = self.maximum is not None or self.below is not None
        within = all(-self._largest <= item <= self._largest for item in items if has_type(item, float))
        if self.number_type is None or bounded or within:
            return text
        return f"{text}, at most {_text(WHOLE_MAX)}" if self.number_type is int else f"{text}, finite in float32"

    def values(self) -> str:
        """Returns the allowed values as text: "sigmoid, softmax" or "a number from 0 to 1"; "" if all are allowed."""
        if self.choices is not None:
            return ("" if self.item_type is None else "some of ") + ", ".join(self._names())
        if self.item_type is None:
            text = self.bounds()
            return f"a number {text}" if text.startswith(("from", "above", "below", "at most")) else text
        noun, text = NOUNS[self.item_type], self.bounds()
        count = "" if self.length is None else f"{self.length} "
        return count + noun + (f" of {text}" if text[:1].isdigit() else f" {text}").rstrip()

    def _names(self) -> list[str]:
        """Returns the choices as text."""
        return [str(choice) or "''" for choice in self.choices or ()]

    def bounds(self) -> str:
        """Returns the declared bounds as text: "1 or more", "from 0 to 1", "above 0 and below 1"."""
        if self.minimum is not None and self.maximum is not None:
            return f"from {_text(self.minimum)} to {_text(self.maximum)}"
        parts = [] if self.minimum is None else [f"{_text(self.minimum)} or more"]
        parts += [] if self.above is None else [f"above {_text(self.above)}"]
        parts += [] if self.below is None else [f"below {_text(self.below)}"]
        parts += [] if self.maximum is None else [f"at most {_text(self.maximum)}"]
        return " and ".join(parts)


def _text(bound: int | float) -> str:
    """Returns a bound as text; the largest number of 32 bits as 2^32 - 1."""
    if isinstance(bound, int) and bound >= 2**16 - 1 and (bound + 1).bit_count() == 1:
        return f"2^{bound.bit_length()} - 1"
    return str(bound)


def key(default: Any, help: str, *, choices: Iterable[Any] | None = None, **known: Any) -> Any:
    """Declares a field as a config key.

    Args:
      default: the default value, or a function that returns it if it depends on the machine. The annotation of the
        field is the type; `| None` makes the key optional.
      help: meaning of the value.
      choices: allowed values, in the order of the documentation; of a tuple's elements if the annotation names their
        type, as in `tuple[str, ...]`. The same holds for bounds.
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
        known = _annotated(field.name, hints[field.name])
        if known["optional"]:
            config[field.name] = placeholder(known["value_type"])
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
        entry = field.metadata.get("key", Key(""))
        result[name] = dataclasses.replace(entry, default=value, **_annotated(field.name, hints[field.name]), **known)
    return result


def optional_keys(keys: type, none: str) -> type:
    """Returns a dataclass of the same keys, each None unless a config sets it.

    Args:
      keys: a dataclass of keys.
      none: what None means, for the tables. A key that may be None in `keys` has its own words for it.
    """
    hints = typing.get_type_hints(keys)
    fields = []
    for name, entry in declared(keys).items():
        text = entry.help if entry.optional else f"{entry.help}; None = {none}"
        field: Any = dataclasses.field(default=None, metadata={"key": dataclasses.replace(entry, help=text)})
        fields.append((name, hints[name] | None, field))
    return dataclasses.make_dataclass(keys.__name__, fields, frozen=True)


def check_values(keys: Mapping[str, Key], values: Mapping[str, Any]) -> None:
    """Checks values by dotted key; keys without a value are skipped.

    Raises:
      UserError: for the first value that is not one of its key's choices, or out of range.
    """
    for name, entry in keys.items():
        if name in values:
            entry.check(name, values[name])


def has_type(value: Any, wanted: type) -> bool:
    """Returns whether `value` is valid for the type `wanted`: an int is a valid float, a bool is not a valid number."""
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _annotated(name: str, hint: Any) -> dict[str, Any]:
    """Returns what an annotation says of a key: value_type, item_type, length and optional of `Key`.

    `int | float` is float, which admits whole numbers.

    Raises:
      UserError: the annotation is no class, nor one class and None.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = set(typing.get_args(hint)) if union else {hint}
    kinds = parts - {type(None)}
    kind = float if kinds == {int, float} else next(iter(kinds), None)
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type) or origin is Any or (len(kinds) > 1 and origin is not float):
        raise UserError(f"the key {name} is annotated {hint}, expected one type, with `| None` or without: change it")
    items = typing.get_args(kind) if origin is tuple else ()
    item_types = set(items) - {Ellipsis}
    item = next(iter(item_types)) if len(item_types) == 1 else None
    return {
        "value_type": origin,
        "optional": parts != kinds,
        "item_type": item if item in NOUNS else None,
        "length": len(items) if item in NOUNS and Ellipsis not in items else None,
    }
