"""Which of two evaluations is better by `config.best_metric`: one answer for the best checkpoint and for patience."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


def check_metric(metric: str | None, measured: Iterable[str]) -> None:
    """Checks that an evaluation measures the metric that decides (None: nothing is decided).

    Raises:
      UserError: it does not; the sentence names the nearest metric and all of them.
    """
    names = sorted(measured)
    if metric is not None and metric not in names:
        found = f"config.best_metric={metric!r} is not measured in the course of training"
        raise UserError(f"{found}, expected one of {', '.join(names)}: change it{did_you_mean(metric, names)}")


def score(results: Mapping[str, Any] | None, metric: str | None, mode: str) -> float:
    """Larger is better; -inf where nothing ranks: without results or a metric, or for a value that is not finite.

    Args:
      results: of an evaluation; None where there was none.
      metric: the name in `results` that decides.
      mode: "max" or "min".

    Raises:
      UserError: as `check_metric`.
    """
    if results is None or metric is None:
        return -math.inf
    check_metric(metric, results)
    value = results[metric]
    if value is None or not math.isfinite(value):  # None is how JSON holds a NaN
        return -math.inf
    return float(value) if mode == "max" else -float(value)
