"""Reads peft's adapter_config.json: which options are supported, and which modules it adapts, by peft's rules.

Sources: peft 0.21, `LoraConfig`, `check_target_module_exists` and `get_pattern_key`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.files.side_files import is_off, read_json
from train_jax.core.errors import UserError, listed, quoted

FILE = "adapter_config.json"
# Supported options and their defaults in peft, which a file may leave out.
DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
# Options that do not change what an adapter computes: provenance, and its initialisation.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that do not change the base's weights; pissa, olora, corda, loftq and lora_ga do.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json.

    Attributes:
      text: the file's JSON as one string, so that configs compare and hash. Options are sorted by name; values keep the
        file's order, as the first pattern that matches is used.
    """

    text: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "PeftConfig":
        """Returns the config of a JSON object that `check` has passed."""
        return cls(json.dumps(dict(sorted(values.items())), indent=2))

    @property
    def values(self) -> dict[str, Any]:
        """The file's JSON object."""
        return json.loads(self.text)

    def __getitem__(self, option: str) -> Any:
        return DEFAULTS[option] if self.values.get(option) is None else self.values[option]

    def targets(self, name: str) -> bool:
        """Returns whether the module of this name has an adapter."""
        targets, excluded = self["target_modules"], self["exclude_modules"]
        if excluded and _matches(excluded, name):
            return False
        if isinstance(targets, str) or name in targets:
            return _matches(targets, name)
        return _matches(targets, name) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        layers, layouts = self["layers_to_transform"], self["layers_pattern"]
        if layers is None or layers == []:
            return True
        layouts = [layouts] if isinstance(layouts, str) and layouts else layouts or [r"[^.]*"]
        matches = (re.match(rf"(?:^|.*?\.){layout}\.(?P<index>\d+)\.", name) for layout in layouts)
        match = next(filter(None, matches), None)
        return match is not None and int(match["index"]) in ([layers] if isinstance(layers, int) else layers)

    def rank(self, name: str) -> int:
        """Returns the rank of the module of this name."""
        return _by_pattern(self["rank_pattern"], name, self["r"])

    def alpha(self, name: str) -> int | float:
        """Returns alpha of the module of this name."""
        return _by_pattern(self["alpha_pattern"], name, self["lora_alpha"])


def _matches(targets: str | list[str], name: str) -> bool:
    """Returns whether a name matches: a string as a regular expression for all of it, a list by names or suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first key that matches the name, or its end after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def read_config(folder: Path) -> PeftConfig:
    """Reads and checks a folder's adapter_config.json.

    Raises:
      UserError: no such file, not LoRA, options that are not supported, or invalid values; lists them.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {FILE}, expected a folder that peft's save_pretrained wrote: check the path."
        )
    values = read_json(file)
    check(values, str(file))
    return PeftConfig.of(values)


def check(values: Mapping[str, Any], where: str) -> None:
    """Refuses a config that would load as another adapter than it describes.

    Raises:
      UserError: see `read_config`; `where` names the file.
    """
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where} has peft_type {values.get('peft_type')!r}, expected 'LORA': no other kind is read.")
    on = [
        f"{option}={value!r}"
        for option, value in values.items()
        if option not in DEFAULTS and option not in HARMLESS and not _is_off(option, value)
    ]
    if on:
        raise UserError(f"{where} uses options that are not supported, {listed(on)}: train the adapter without them.")
    wrong = [f"{option}={values[option]!r}" for option in DEFAULTS if not _is_valid(option, values.get(option))]
    if values.get("target_modules") is None:
        wrong.append("target_modules=None")
    if wrong:
        raise UserError(f"{where} has invalid values, {listed(wrong)}: correct them or save it again.")
    _check_layers(values, where)


def _check_layers(values: Mapping[str, Any], where: str) -> None:
    """Refuses layer choices that have no effect, as peft does."""
    targets, layers, layouts = (values.get(key) for key in ("target_modules", "layers_to_transform", "layers_pattern"))
    for option, value in (("layers_to_transform", layers), ("layers_pattern", layouts)):
        if isinstance(targets, str) and value is not None:
            raise UserError(
                f"{where} has {option}={quoted(value)} beside target_modules={quoted(targets)}, expected a list of "
                "modules with it, as a regular expression chooses the layers itself: take one of them out."
            )
    if layouts and layers is None:
        raise UserError(
            f"{where} has layers_pattern={quoted(layouts)} without layers_to_transform, expected both: add the layers."
        )


def _is_off(option: str, value: Any) -> bool:
    """Returns whether an option, known or not, is switched off."""
    if option == "init_lora_weights":
        return value in INITIALISATIONS
    return is_off(value) or (option == "bias" and value == "none")


def _is_valid(option: str, value: Any) -> bool:
    """Returns whether a supported option has a valid value; None means that the file does not have it."""
    if value is None:
        return True
    match option:
        case "r":
            return _is_rank(value)
        case "lora_alpha":
            return _is_alpha(value)
        case "lora_dropout":
            return _is_number(value) and 0 <= value < 1
        case "target_modules" | "exclude_modules" | "layers_pattern":
            names = [value] if isinstance(value, str) else value
            texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
            regular = isinstance(value, str) or option == "layers_pattern"
            return texts and (not regular or all(map(_is_regular, names)))
        case "layers_to_transform":
            return all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))
        case "rank_pattern":
            return _is_pattern(value, _is_rank)
        case "alpha_pattern":
            return _is_pattern(value, _is_alpha)
        case _:
            return isinstance(value, bool)


def _is_pattern(value: Any, valid) -> bool:
    return isinstance(value, dict) and all(_is_regular(key) and valid(each) for key, each in value.items())


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    """Returns whether alpha is valid; with 0 the adapter would do nothing."""
    return _is_number(value) and value != 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_regular(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
