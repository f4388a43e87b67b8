"""Adapters of a VQA run: checks their config keys, makes the method of the run, and writes what it trained.

The keys are in config.py, the methods in adapt/peft/methods.py, their files in weights/adapters.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
from ml_collections import ConfigDict

from paligemma_jax.adapt.lora.method import Lora
from paligemma_jax.adapt.method import Method
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.adapters.method_folder import save_adapter
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

FOLDER = "adapter"
"""Folder of the workdir to which a run writes its adapters, for peft and for the adapter.path of another run."""

FROM_FILES = tuple(field.name for field in dataclasses.fields(Lora) if field.name != "dropout")
"""Keys that the files of adapter.path determine."""

NO_EFFECT = ("rank", "alpha", "dropout")
"""Keys that have no effect beside a method that does not have them, where all others are refused."""

NAMES = (*METHODS, "none")

PRESETS = {
    "lora": {},
    "dora": {"adapter.dora": True},
    "bottleneck": {"adapter.name": "bottleneck"},
    "prefix": {"adapter.name": "prefix", "optimizer.learning_rate": 3e-1},
    "prompt": {"adapter.name": "prompt", "optimizer.learning_rate": 1.0},
    "bitfit": {"adapter.name": "bitfit", "optimizer.learning_rate": 1e-2, "cache_features": False},
    "diff_pruning": {
        "adapter.name": "diff_pruning",
        "adapter.penalty": 0.05,
        "optimizer.learning_rate": 1e-3,
        "optimizer.rates": ((r".*/log_alpha", 30.0),),  # gates have further to go than differences
    },
    "last_layers": {"adapter.name": "last_layers", "adapter.size": 2, "optimizer.learning_rate": 1e-3},
    "decoder": {"adapter.name": "none", "trainable": "decoder/.*", "optimizer.learning_rate": 5e-4},
    "full": {"adapter.name": "none", "optimizer.learning_rate": 5e-4, "cache_features": False},
}
"""Config overrides of each method over configs/clevr.py: its own keys and a learning rate tuned on the small model."""


def use_method(config: ConfigDict, name: str, large: bool) -> None:
    """Sets the keys of one of `PRESETS`; weights of a large base train at 1e-5, as in most of PaliGemma's transfers.

    Raises:
      UserError: there is no such method.
    """
    if name not in PRESETS:
        raise UserError(f"the config argument peft is {name!r}, expected one of {', '.join(PRESETS)}: change it.")
    config.update_from_flattened_dict(PRESETS[name])
    if large and name in ("last_layers", "decoder", "full"):
        config.optimizer.learning_rate = 1e-5


def check(adapter: ConfigDict, defaults: ConfigDict) -> None:
    """Checks the keys of `adapter`, without the model.

    Args:
      adapter: the keys.
      defaults: their default values.

    Raises:
      UserError: the first fault.
    """
    changed = [key for key in defaults if adapter[key] != defaults[key]]
    _check_method(adapter, changed)
    decided = [key for key in FROM_FILES if key in changed]
    if adapter.path is not None and decided:
        raise UserError(
            f"adapter.{decided[0]} is {adapter[decided[0]]!r} beside adapter.path={adapter.path!r}, whose files decide "
            "it, expected one of the two: leave it out or set adapter.path=None."
        )
    _check_layers(adapter.layers)
    _check_pairs("rank_pattern", adapter.rank_pattern, "whole number of 1 or more", lambda r: type(r) is int and r >= 1)
    _check_pairs("alpha_pattern", adapter.alpha_pattern, "finite number above 0", _is_alpha)


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _check_method(adapter: ConfigDict, changed: list[str]) -> None:
    """Raises UserError for keys that the method does not have."""
    for key in changed:
        having = [name for name in METHODS if key in keys_of(name)]
        if key not in ("name", *NO_EFFECT) and adapter.name not in having:
            raise UserError(
                f"adapter.{key} is {adapter[key]!r} beside adapter.name={adapter.name!r}, which has none, expected "
                f"{'one of ' if len(having) > 1 else ''}{', '.join(having)}: leave it out or change the name."
            )


def keys_of(name: str) -> set[str]:
    """Returns the keys that a method has, which are its options, and `path` if it reads folders of peft."""
    method = METHODS[name]
    return {field.name for field in dataclasses.fields(method)} | ({"path"} if method.in_peft_format else set())


def method_of(adapter: ConfigDict) -> Method[PaliGemma] | None:
    """Returns the method of a run with its options; None for "none"."""
    if adapter.name == "none":
        return None
    kind = METHODS[adapter.name]
    options = {field.name: adapter[field.name] for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in options.items() if value is not None})


def _check_layers(layers: tuple) -> None:
    """Raises UserError unless the numbers are different."""
    if len(set(layers)) != len(layers):
        raise UserError(
            f"adapter.layers is {layers!r}, expected different numbers of layers, such as (0, 1), or () for all: "
            "correct it."
        )


def _check_pairs(key: str, pairs: tuple, expected: str, valid: Callable[[Any], bool]) -> None:
    """Raises UserError for an entry that is not a pair of a pattern and a valid value, which `expected` describes."""
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) and valid(pair[1])):
            raise UserError(
                f"adapter.{key} holds {pair!r}, expected pairs of a pattern and a {expected}, such as "
                r"((r'decoder/layers/0/.*', 4),): correct it."
            )
        patterns.compile_regex(pair[0])


def export(model: PaliGemma, folder: Path, method: Method[PaliGemma], base: str) -> None:
    """Writes the trained parameters as a folder; every process calls it, the first writes.

    Args:
      model: with adapters, on a mesh or not.
      folder: created if missing.
      method: with the options that it was attached with.
      base: path of the base, noted in peft's folder.
    """
    graph, arrays = param_tree.split(model)
    trained = patterns.select(method.trainable, arrays, what="adapters")
    gathered = arrays | {path: sharding.to_host(cast(jax.Array, arrays[path])) for path in trained}
    if jax.process_index() == 0:
        save_adapter(cast(PaliGemma, param_tree.merge(graph, gathered)), folder, method, base)
