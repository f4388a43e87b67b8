"""Ranks evaluations by `config.best_metric`, for the best checkpoint and for early stopping."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


def check_metric(metric: str | None, names: Iterable[str]) -> None:
    """Checks that the evaluations during training have the metric `metric`, if it is not None.

    Args:
      metric: `config.best_metric`.
      names: of all metrics of an evaluation.

    Raises:
      UserError: they do not; the message lists all metrics and suggests the nearest.
    """
    names = sorted(names)
    if metric is not None and metric not in names:
        raise UserError(
            f"config.best_metric={metric!r} is not measured during training, expected one of "
            f"{', '.join(names)}: change it{did_you_mean(metric, names)}"
        )


def score(results: Mapping[str, Any] | None, metric: str | None, mode: str) -> float:
    """Returns the score of an evaluation, larger is better; -inf without results, metric or a finite value.

    Args:
      results: metrics of an evaluation; None if there was none.
      metric: name of the metric that ranks.
      mode: "max" or "min".

    Raises:
      UserError: as `check_metric`.
    """
    if results is None or metric is None:
        return -math.inf
    check_metric(metric, results)
    value = results[metric]
    if value is None or not math.isfinite(value):  # in JSON a NaN is null
        return -math.inf
    return float(value) if mode == "max" else -float(value)
