"""Describes a model's adapters by an adapter_config.json: the one they were read with if it fits, else a new one."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.weights.adapters.peft_config import PeftConfig
from paligemma_jax.weights.adapters.peft_names import RELEASES, Slot, in_memory
from train_jax.core.errors import UserError

NEWEST = next(iter(RELEASES))


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of adapters that were read from a peft folder, stored in `LoraSpec.origin`."""

    config: PeftConfig
    release: str


def describe(
    modules: Mapping[str, LoraProjection], slots: list[Slot], base: str | Path | None, release: str | None
) -> tuple[PeftConfig, str]:
    """Returns the config, and the release of transformers whose module names it uses.

    Args:
      modules: every projection with an adapter, by path.
      slots: of the model.
      base, release: see `save_peft`.

    Raises:
      UserError: adapters that differ in an option that a config has once for all.
    """
    adapted = {}
    for slot in slots:
        spec = modules[slot.path].lora_spec if slot.path in modules else None
        if spec is not None and spec.ranks[slot.layer or 0]:
            adapted[slot] = spec.ranks[slot.layer or 0], spec.alphas[slot.layer or 0]
    common = {
        "use_rslora": {module.lora_spec.rslora for module in modules.values()},
        "use_dora": {module.lora_magnitude is not None for module in modules.values()},
        "lora_dropout": {module.lora_dropout for module in modules.values()},
    }
    for option, values in common.items():
        if len(values) > 1:
            raise UserError(f"the adapters have {option} {sorted(values)}, expected one for all, as a peft config has.")
    options = {option: values.pop() for option, values in common.items()}
    origins = {module.lora_spec.origin for module in modules.values()}
    origin = origins.pop() if len(origins) == 1 else None
    if isinstance(origin, Origin) and _fits(origin, release, slots, adapted, options):
        config, release = origin.config, origin.release
    else:
        release = release or NEWEST
        config = _new(slots, adapted, options, release)
    return (config if base is None else PeftConfig.of(config.values | {"base_model_name_or_path": str(base)})), release


def _fits(
    origin: Origin,
    release: str | None,
    slots: list[Slot],
    adapted: Mapping[Slot, tuple[int, float]],
    options: Mapping[str, Any],
) -> bool:
    """Returns whether a config that was read still describes the adapters."""
    config, names = origin.config, {slot: in_memory(slot.name, origin.release) for slot in slots}
    return (
        release in (None, origin.release)
        and all(config[option] == value for option, value in options.items())
        and {slot for slot in slots if config.targets(names[slot])} == set(adapted)
        and all((config.rank(names[slot]), config.alpha(names[slot])) == pair for slot, pair in adapted.items())
    )


def _new(
    slots: list[Slot], adapted: Mapping[Slot, tuple[int, float]], options: Mapping[str, Any], release: str
) -> PeftConfig:
    """Returns a config with the most frequent r and alpha, and patterns for the others."""
    names = {slot: in_memory(slot.name, release) for slot in slots}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*adapted.values(), strict=True))
    values = dict(options) | {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {names[slot]: r for slot, (r, _) in adapted.items() if r != rank},
        "alpha_pattern": {names[slot]: _number(a) for slot, (_, a) in adapted.items() if a != alpha},
    }
    expected = {names[slot] for slot in adapted}
    for targets in _targets(adapted, names):
        config = PeftConfig.of(values | targets)
        if {name for name in names.values() if config.targets(name)} == expected:
            break
    return config


def _targets(adapted: Mapping[Slot, Any], names: Mapping[Slot, str]) -> Iterator[dict[str, Any]]:
    """Yields descriptions of the adapted modules, the shortest first; the last one is always right."""
    leaves = sorted({names[slot].rpartition(".")[2] for slot in adapted})
    layers = sorted({slot.layer for slot in adapted if slot.layer is not None})
    yield {"target_modules": leaves, "layers_to_transform": None}
    yield {"target_modules": leaves, "layers_to_transform": layers}
    for tower in ("language_model", "vision_tower"):
        yield {"target_modules": rf".*{tower}\..*\.({'|'.join(leaves)})", "layers_to_transform": None}
    yield {"target_modules": sorted(names[slot] for slot in adapted), "layers_to_transform": None}


def _number(alpha: float) -> int | float:
    """Returns alpha as an integer if it is one, as peft writes it."""
    return int(alpha) if alpha == int(alpha) else alpha
