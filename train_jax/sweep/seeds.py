"""Repeats the runs of a sweep with several seeds."""

from collections.abc import Iterable, Mapping
from typing import Any

Overrides = Mapping[str, Any]


def over_seeds(
    runs: Mapping[str, Overrides], seeds: Iterable[int] = range(3)
) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Returns the value of `config.sweep.runs` that has every run with every seed, ordered by seed.

    Args:
      runs: overrides by name of the run, {name: {dotted key: value}}.
      seeds: values of the config key `seed`; "-seed-0" and so on is appended to the names.
    """
    return tuple(
        (f"{name}-seed-{seed}", {**overrides, "seed": seed}) for seed in seeds for name, overrides in runs.items()
    )
