"""The adapters of a VQA run: their config keys checked, attached new or read from a folder, and written at the end.

The keys are in vqa_config.py. Arithmetic and layout are in adapt/lora.py, peft's files in weights/peft.py.
"""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.adapt import lora
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.weights.peft import Adapter, Shardings, load_peft, save_peft
from train_jax import params, patterns
from train_jax.errors import UserError

FOLDER = "adapter"
"""Where in its workdir a run leaves its adapters, for peft and for the next run's adapter.path."""

FROM_FILES = ("targets", "rank", "alpha", "rslora", "dora", "layers", "rank_pattern", "alpha_pattern")
"""Keys that the files of adapter.path decide."""

LORA_ALONE = ("dora", "layers", "rank_pattern", "alpha_pattern", "path")


def check(adapter: ConfigDict, defaults: ConfigDict) -> None:
    """Checks the keys below `adapter` on their own.

    Args:
      adapter: the keys.
      defaults: their default values.

    Raises:
      UserError: the first fault found.
    """
    changed = [key for key in (*FROM_FILES, "path") if adapter[key] != defaults[key]]
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout is {adapter.dropout}, expected 0 or more and less than 1: change it.")
    foreign = [key for key in LORA_ALONE if key in changed]
    if adapter.name != "lora" and foreign:
        raise UserError(
            f"adapter.{foreign[0]} is {adapter[foreign[0]]!r} beside adapter.name={adapter.name!r}, which has none, "
            "expected lora: set adapter.name=lora or leave it out."
        )
    decided = [key for key in FROM_FILES if key in changed]
    if adapter.path is not None and decided:
        raise UserError(
            f"adapter.{decided[0]} is {adapter[decided[0]]!r} beside adapter.path={adapter.path!r}, whose files decide "
            "it, expected one of the two: leave it out or set adapter.path=None."
        )
    _check_layers(adapter.layers)
    _check_pairs("rank_pattern", adapter.rank_pattern, "whole number of 1 or more", lambda r: type(r) is int and r >= 1)
    _check_pairs("alpha_pattern", adapter.alpha_pattern, "number but 0", lambda a: type(a) in (int, float) and a != 0)


def _check_layers(layers: tuple) -> None:
    valid = all(type(layer) is int and layer >= 0 for layer in layers)
    if not valid or len(set(layers)) != len(layers):
        raise UserError(
            f"adapter.layers is {layers!r}, expected different numbers of layers from 0 on, such as (0, 1), or () for "
            "all: correct it."
        )


def _check_pairs(key: str, pairs: tuple, wanted: str, valid) -> None:
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) and valid(pair[1])):
            raise UserError(
                f"adapter.{key} holds {pair!r}, expected pairs of a pattern and a {wanted}, such as "
                r"((r'decoder/layers/0/.*', 4),): correct it."
            )
        patterns.check_regex(pair[0])


def attach(
    model: PaliGemma, adapter: ConfigDict, opened: Adapter | None, seed: int, shardings: Shardings | None = None
) -> PaliGemma:
    """Gives a base the adapters that a run starts with, in place, in float32.

    Args:
      model: without adapters.
      adapter: the keys.
      opened: the folder of adapter.path, None for new adapters.
      seed: draws new ones.
      shardings: where the arrays of a folder go, as of `load_peft`.

    Raises:
      UserError: keys or a folder that do not fit the model.
    """
    if opened is not None:
        return load_peft(model, opened, dtype="float32", dropout=adapter.dropout, shardings=shardings)
    return lora.attach_lora(
        model,
        adapter.targets,
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


def trained_paths(model: PaliGemma, attach: Callable[[PaliGemma], PaliGemma]) -> list[str]:
    """Paths of the parameters that train once the model is given its adapters; it stays as it is."""
    graph, arrays = params.split(model)
    attached = nnx.eval_shape(lambda arrays: attach(params.merge(graph, arrays)), arrays)
    return patterns.select(lora.TRAINABLE, params.abstract(attached), what="adapters")


def export(model: PaliGemma, folder: Path, base: str) -> None:
    """Writes the adapters as a folder that peft opens on the same base; every process calls it, the first writes.

    Args:
      model: with adapters, on a mesh or not.
      folder: made if missing.
      base: what the folder says that its base is.
    """
    graph, arrays = params.split(model)
    gathered = {path: common.to_host(leaf) for path, leaf in arrays.items() if "/lora_" in path}
    if jax.process_index() == 0:
        save_peft(params.merge(graph, arrays | gathered), folder, base=base)
