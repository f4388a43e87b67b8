"""Adapters of a VQA run: checks their config keys, attaches them (new or from a folder) and writes them at the end.

The keys are in config.py. LoRA's arithmetic and layout are in adapt/lora/adapter.py, peft's files in
weights/adapters/peft.py; the other methods are in adapt/peft/methods.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.adapt.lora import adapter as lora
from paligemma_jax.adapt.peft import diff_pruning
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.adapters.method_folder import save_adapter
from paligemma_jax.weights.adapters.peft import PeftFolder, Shardings, load_peft, save_peft
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

FOLDER = "adapter"
"""Folder of the workdir to which a run writes its adapters, for peft and for the adapter.path of another run."""

FROM_FILES = ("targets", "rank", "alpha", "rslora", "dora", "layers", "rank_pattern", "alpha_pattern")
"""Keys that the files of adapter.path determine."""

DECODER_ATTENTION = r"decoder/.*/(q_proj|o_proj)"
"""Modules that LoRA adapts by default."""

LORA_ONLY = ("rslora", "dora", "layers", "rank_pattern", "alpha_pattern", "path")
NOISE_PER_STEP = ("diff_pruning",)
"""Methods that draw noise once a step, the same for all rows."""

NAMES = ("lora", "none", *METHODS)


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
    changed = [key for key in (*FROM_FILES, "path") if adapter[key] != defaults[key]]
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout is {adapter.dropout}, expected 0 or more and less than 1: change it.")
    foreign = [key for key in LORA_ONLY if key in changed]
    if adapter.name != "lora" and foreign:
        raise UserError(
            f"adapter.{foreign[0]} is {adapter[foreign[0]]!r} beside adapter.name={adapter.name!r}, which has none, "
            "expected lora: set adapter.name=lora or leave it out."
        )
    _check_method(adapter)
    decided = [key for key in FROM_FILES if key in changed]
    if adapter.path is not None and decided:
        raise UserError(
            f"adapter.{decided[0]} is {adapter[decided[0]]!r} beside adapter.path={adapter.path!r}, whose files decide "
            "it, expected one of the two: leave it out or set adapter.path=None."
        )
    _check_layers(adapter.layers)
    _check_pairs("rank_pattern", adapter.rank_pattern, "whole number of 1 or more", lambda r: type(r) is int and r >= 1)
    _check_pairs("alpha_pattern", adapter.alpha_pattern, "number but 0", lambda a: type(a) in (int, float) and a != 0)


def _check_method(adapter: ConfigDict) -> None:
    """Raises UserError for keys that the method does not have."""
    method, name = METHODS.get(adapter.name), f"adapter.name={adapter.name!r}"
    size = None if method is None else method.size
    if adapter.size is not None and size is None:
        sized = ", ".join(name for name, method in METHODS.items() if method.size)
        raise UserError(
            f"adapter.size is {adapter.size} beside {name}, which has none, expected one of {sized}: leave it out."
        )
    if adapter.size is not None and size is not None and adapter.size < 1:
        raise UserError(f"adapter.size is {adapter.size} (the {size[0]}), expected 1 or more: raise it.")
    if adapter.targets is not None and adapter.name != "lora" and (method is None or method.targets is None):
        raise UserError(
            f"adapter.targets is {adapter.targets!r} beside {name}, which takes none: set adapter.targets=None."
        )
    if adapter.penalty < 0 or (adapter.penalty and adapter.name != "diff_pruning"):
        raise UserError(
            f"adapter.penalty is {adapter.penalty} beside {name}, expected 0, or a positive number beside "
            "diff_pruning: change one of the two."
        )


def _check_layers(layers: tuple) -> None:
    """Raises UserError unless the numbers are different and not negative."""
    valid = all(type(layer) is int and layer >= 0 for layer in layers)
    if not valid or len(set(layers)) != len(layers):
        raise UserError(
            f"adapter.layers is {layers!r}, expected different numbers of layers from 0 on, such as (0, 1), or () for "
            "all: correct it."
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


def attach(
    model: PaliGemma, adapter: ConfigDict, opened: PeftFolder | None, seed: int, shardings: Shardings | None = None
) -> PaliGemma:
    """Attaches the adapters that a run starts with, in float32.

    Args:
      model: the base, without adapters; changed in place.
      adapter: the keys.
      opened: the folder of adapter.path, None for new adapters.
      seed: of new adapters.
      shardings: of the arrays of a folder, see `load_peft`.

    Returns:
      The model with adapters; use it in place of `model`.

    Raises:
      UserError: keys or a folder that do not fit the model.
    """
    if adapter.name in METHODS:
        method = METHODS[adapter.name]
        default_size = method.size[1] if method.size else 0
        targets = adapter.targets or method.targets or ""
        attached = method.attach(model, adapter.size or default_size, targets, nnx.Rngs(seed))
        return cast(PaliGemma, attached)  # of the same class
    if opened is not None:
        return load_peft(model, opened, dtype="float32", dropout=adapter.dropout, shardings=shardings)
    attached = lora.attach_lora(
        model,
        adapter.targets or DECODER_ATTENTION,
        adapter.rank,
        adapter.alpha,
        adapter.dropout,
        rslora=adapter.rslora,
        dora=adapter.dora,
        layers=adapter.layers or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        rngs=nnx.Rngs(seed),
    )
    return cast(PaliGemma, attached)  # of the same class


def prompt_length(adapter: ConfigDict) -> int:
    """Returns the number of learned inputs between image and text."""
    if adapter.name != "prompt":
        return 0
    assert METHODS["prompt"].size is not None
    return adapter.size or METHODS["prompt"].size[1]


def trainable(adapter: ConfigDict) -> str:
    """Returns the pattern of the parameters that train."""
    if adapter.name == "lora":
        return lora.TRAINABLE
    method = METHODS[adapter.name]
    pattern = method.trainable or adapter.targets or method.targets
    assert pattern is not None  # a method has one of these
    return pattern


def trained_paths(model: PaliGemma, adapter: ConfigDict, attach: Callable[[PaliGemma], PaliGemma]) -> list[str]:
    """Returns the paths of the parameters that train once adapters are attached; `model` is not changed."""
    graph, arrays = param_tree.split(model)
    attached = nnx.eval_shape(lambda arrays: attach(cast(PaliGemma, param_tree.merge(graph, arrays))), arrays)
    return patterns.select(trainable(adapter), param_tree.abstract(attached), what="adapters")


def penalty(model: PaliGemma, adapter: ConfigDict) -> jax.Array | float:
    """Returns the penalty of a mean loss: diff pruning's expected share of changed entries, times its weight."""
    return adapter.penalty * diff_pruning.expected_share(model) if adapter.penalty else 0.0


def describe(model: PaliGemma, adapter: ConfigDict) -> str:
    """Returns LoRA's table, or a line about the parameters of another method."""
    if adapter.name == "lora":
        return lora.format_lora_table(lora.lora_table(model))
    arrays = param_tree.abstract(model)
    paths = patterns.select(trainable(adapter), arrays, what="adapters")
    number = sum(arrays[path].size for path in paths)
    return f"{adapter.name}: {number:,} parameters in {len(paths)} arrays, {paths[0]} the first"


def export(model: PaliGemma, folder: Path, adapter: ConfigDict, base: str) -> None:
    """Writes the trained parameters as a folder, LoRA's in peft's format; every process calls it, the first writes.

    Args:
      model: with adapters, on a mesh or not.
      folder: created if missing.
      adapter: the keys.
      base: path of the base, noted in peft's folder.
    """
    graph, arrays = param_tree.split(model)
    trained = patterns.select(trainable(adapter), arrays, what="adapters")
    gathered = arrays | {path: sharding.to_host(cast(jax.Array, arrays[path])) for path in trained}
    if jax.process_index() != 0:
        return
    model = cast(PaliGemma, param_tree.merge(graph, gathered))
    if adapter.name == "lora":
        save_peft(model, folder, base=base)
    else:
        save_adapter(model, folder, adapter.name, adapter.size, adapter.targets)
