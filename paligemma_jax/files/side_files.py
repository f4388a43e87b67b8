"""The JSON files beside a model's weights: read, and accounted for key by key, as the weights are.

A table says of the keys of one kind of file which are read, which may only say what every model here does, and which
have no effect. Nothing else passes: a value that would change the result is read, or refused by its name.
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
class Keys:
    """What is known of the keys of one JSON object; None stands for a key that is left out, everywhere.

    Attributes:
      read: the reader looks at them.
      only: the values that mean what models here do; others are refused.
      dropout: shares that are dropped, in training alone and not in training here: one above 0 is told of in the log.
      idle: they change nothing of what is computed here.
    """

    read: frozenset[str] = frozenset()
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    dropout: frozenset[str] = frozenset()


def account(values: Mapping[str, Any], keys: Keys, file: str | Path, section: str = "") -> None:
    """Refuses what is neither read nor without effect.

    Args:
      values: a JSON object.
      keys: what is known of it. Keys of no table may be off (null, false, empty), as newer releases write theirs.
      file: where it stands.
      section: what stands before a key's name in messages: "text_config.".

    Raises:
      UserError: one of the values, with its file and key.
    """
    for key, value in values.items():
        if value is None or key in keys.read or key in keys.idle:
            continue
        if key in keys.dropout:
            _tell_of_dropout(value, file, section + key)
        elif key not in keys.only:
            if not is_off(value):
                raise refusal(file, section + key, value, "no key beyond those that are known here")
        elif not any(type(value) is type(each) and value == each for each in keys.only[key]):
            raise refusal(file, section + key, value, " or ".join(map(repr, keys.only[key])))


def _tell_of_dropout(value: Any, file: str | Path, key: str) -> None:
    """Refuses what is no share; tells of one that is lost in training."""
    if type(value) not in (int, float) or not 0 <= value < 1 or math.isnan(value):
        raise refusal(file, key, value, "a share from 0 up to below 1", "correct it")
    if value:
        logging.warning("%s has %s = %s, of training alone: training here drops nothing there.", file, key, value)


def is_off(value: Any) -> bool:
    """Whether a value switches an option off."""
    return value is None or value is False or (isinstance(value, (list, dict, str)) and not value)


def refusal(file: str | Path, key: str, value: Any, expected: str, remedy: str | None = None) -> UserError:
    """The error of a value that cannot be used: file, key and value, what was expected, and what to do."""
    remedy = remedy or "give a model without it, or take the key out if it changes nothing"
    return UserError(f"{file} has {key} = {quoted(value)}, expected {expected}: {remedy}.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
      UserError: it is missing or broken.
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
