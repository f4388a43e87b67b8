"""The argument of a config file: the text after the colon of `--config=configs/x.py:3b,lr=1e-4`."""

import ast
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


def parse_arg(arg: str | None, moved: Mapping[str, str] = MappingProxyType({}), /, **defaults: Any) -> ConfigDict:
    """Parses the argument after the colon of `--config=configs/x.py:3b,lr=1e-4`.

    Args:
      arg: comma-separated flags (`3b` sets a bool to True) and `key=value` pairs; None or "" keeps the defaults.
      moved: {key: config file} of former keys whose config is now a file of its own.
      **defaults: every accepted key. A value is read with its default's type; with None as default, as a number if it
        looks like one, else as text. Keys that are no identifiers: `parse_arg(arg, **{"3b": False})["3b"]`.

    Raises:
      UserError: an unknown key, one that has moved, or a value that the key's type cannot read.
    """
    values = dict(defaults)
    items = [item for item in (arg or "").split(",") if item]
    for item in items:
        key, equals, text = item.partition("=")
        if key in moved:
            rest = [other for other in items if other != item]
            others = f"; its docstring says whether it takes {','.join(rest)} too" if rest else ""
            raise UserError(f"config argument {item!r} is now a config of its own: write --config={moved[key]}{others}")
        if not defaults:
            raise UserError(f"config argument {item!r}: this config takes none: leave it out")
        if key not in defaults:
            expected = ", ".join(defaults)
            raise UserError(f"config argument {item!r}: expected one of {expected}{did_you_mean(key, defaults)}")
        values[key] = _parse_value(key, text if equals else None, defaults[key])
    return ConfigDict(values)


def _parse_value(key: str, text: str | None, default: Any) -> Any:
    wanted = type(default)
    if text is None and wanted is bool:
        return True
    if not text:
        example = "VALUE" if default in ("", None) else default
        raise UserError(f"config argument {key!r} needs a value: write {key}={example}")
    if wanted is bool:
        choices = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in choices:
            raise UserError(f"config argument {key}={text!r}, expected true or false: change it")
        return choices[text.lower()]
    if default is None:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        return wanted(text)
    except ValueError as error:
        raise UserError(f"config argument {key}={text!r}, expected {wanted.__name__}: change it") from error


def refuse_together(arg: ConfigDict, names: Iterable[str], reason: str) -> None:
    """Checks that at most one of some keys of a parsed argument is set.

    Raises:
      UserError: several are; the message names them and gives `reason`, a clause such as "the base has one
        quantization".
    """
    given = [name for name in names if arg[name]]
    if len(given) > 1:
        raise UserError(f"the config arguments {' and '.join(given)} exclude each other, expected one: {reason}.")
