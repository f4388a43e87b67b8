"""Runs of a sweep for several seeds."""

from collections.abc import Iterable, Mapping
from typing import Any

Overrides = Mapping[str, Any]


def over_seeds(
    runs: Mapping[str, Overrides], seeds: Iterable[int] = range(3)
) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Returns `config.sweep.runs` of each run with every seed; the runs of one seed are next to each other.

    Args:
      runs: {name: {dotted key: value}}.
      seeds: values of the key `seed`; the name of a run ends in "-seed-0" and so on.
    """
    return tuple((f"{name}-seed-{seed}", {**changes, "seed": seed}) for seed in seeds for name, changes in runs.items())
