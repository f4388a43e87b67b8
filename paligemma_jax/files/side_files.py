"""Reads the JSON files beside a model's weights and accounts for every key in them.

A table lists, for one kind of file, which keys are read, which must have the value that all models here have, and
which have no effect. Any other value that would change the result is refused by its name.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from train_jax.core.errors import UserError, quoted


@dataclasses.dataclass(frozen=True)
class KnownKeys:
    """The known keys of one JSON object. None means that a key is left out.

    Attributes:
      read: keys that the reader uses.
      only: keys whose value must be one of those listed, which are what models here compute; others are refused.
      dropout: dropout rates, which act in training only and are not applied here; a rate above 0 is logged.
      idle: keys that do not affect what is computed here.
    """

    read: frozenset[str] = frozenset()
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    dropout: frozenset[str] = frozenset()


def account(values: Mapping[str, Any], keys: KnownKeys, file: str | Path, section: str = "") -> None:
    """Refuses keys and values that are neither read nor without effect.

    Args:
      values: a JSON object.
      keys: the known keys. Unknown keys may be off (null, false, empty), as newer releases add keys of theirs.
      file: the file that holds the object.
      section: prefix of key names in messages: "text_config.".

    Raises:
      UserError: a value that is refused, with its file and key.
    """
    for key, value in values.items():
        if value is None or key in keys.read or key in keys.idle:
            continue
        if key in keys.dropout:
            _check_dropout(value, file, section + key)
        elif key not in keys.only:
            if not is_off(value):
                raise refusal(file, section + key, value, "no unknown key")
        elif not any(type(value) is type(each) and value == each for each in keys.only[key]):
            raise refusal(file, section + key, value, " or ".join(map(repr, keys.only[key])))


def _check_dropout(value: Any, file: str | Path, key: str) -> None:
    """Refuses a value that is no dropout rate; logs a rate above 0, which training here does not apply."""
    if type(value) not in (int, float) or not 0 <= value < 1 or math.isnan(value):
        raise refusal(file, key, value, "a share from 0 up to below 1", "correct it")
    if value:
        logging.warning("%s has %s = %s for training: training here has no such dropout.", file, key, value)


def is_off(value: Any) -> bool:
    """Returns whether a value switches an option off."""
    return value is None or value is False or (isinstance(value, (list, dict, str)) and not value)


def refusal(file: str | Path, key: str, value: Any, expected: str, remedy: str | None = None) -> UserError:
    """Returns the error for a value that cannot be used: file, key and value, what was expected, and what to do."""
    remedy = remedy or "give a model without it, or take the key out if it changes nothing"
    return UserError(f"{file} has {key} = {quoted(value)}, expected {expected}: {remedy}.")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      UserError: the file is missing or broken.
    """
    if not file.exists():
        raise UserError(f"{file.parent} holds no {file.name}: give a folder as transformers saves it.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, expected a JSON object: download it again.")
    return values
