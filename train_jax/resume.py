"""Whether a run may continue in its workdir under a changed config.

What changes the mathematics is refused. What does not (where and how fast it runs, what it logs and saves, when it
gives up) is free, and the run may be made longer.
"""

import re
from typing import Any

from ml_collections import ConfigDict

from train_jax.config import UNITS, leaves, steps, task_class
from train_jax.errors import UserError

# Patterns over dotted keys; a task adds its own in the class attribute `harmless_keys`.
HARMLESS = (
    r"mesh\..*",
    r"micro_batch",
    r"data\.(workers|threads|on_error|max_bad_fraction)",
    r"(log|eval|checkpoint)_(steps|epochs|examples|percent)",
    r"patience|max_bad_steps|load_best_at_end",
)
TOTALS = tuple(f"total_{unit}" for unit in UNITS)
ABSENT = "(absent)"


def difference(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for every dotted key that differs; a missing one has the value `ABSENT`."""
    before, after = leaves(old), leaves(new)
    pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after]
    return [(key, a, b) for key, a, b in pairs if a != b]


def check_resume(old: ConfigDict, new: ConfigDict, epoch_examples: int | None = None) -> list[str]:
    """Checks that a run made with `old` may go on with `new`.

    Args:
      old: the workdir's own config.
      new: the config asked for.
      epoch_examples: size of the training data, to compare lengths in different units.

    Returns:
      One sentence per change that is allowed.

    Raises:
      UserError: a key that changes the mathematics, or a shorter run; the message lists every such key.
    """
    harmless = HARMLESS + tuple(getattr(task_class(new.task), "harmless_keys", ()))
    refused, notes = [], []
    for key, before, after in difference(old, new):
        if key in TOTALS:
            continue
        change = f"{key}: {before!r} -> {after!r}"
        if any(re.fullmatch(pattern, key) for pattern in harmless):
            notes.append(f"{change} (does not change the mathematics)")
        else:
            refused.append(change)
    if refused:
        raise UserError(
            f"the workdir holds a run with another config ({'; '.join(refused)}), expected the same: undo the change, "
            f"or choose another --workdir"
        )
    return notes + _compare_totals(old, new, epoch_examples)


def _compare_totals(old: ConfigDict, new: ConfigDict, epoch_examples: int | None) -> list[str]:
    totals = [{key: config[key] for key in TOTALS if config.get(key) is not None} for config in (old, new)]
    if totals[0] == totals[1]:
        return []
    before, after = (" ".join(f"{key}={value}" for key, value in total.items()) for total in totals)
    old_steps, new_steps = (steps(config, "total", config.batch_size, epoch_examples) for config in (old, new))
    if new_steps < old_steps:
        raise UserError(
            f"the workdir holds a run of {old_steps} steps ({before}) and {after} asks for {new_steps}, expected as "
            f"many or more: lengthen the run, or choose another --workdir"
        )
    optimizer = new.optimizer
    stretches = optimizer.schedule in ("linear", "cosine") or optimizer.warmup_percent is not None
    note = "; the learning-rate schedule stretches with it" if stretches else ""
    return [f"the run is extended from {old_steps} to {new_steps} steps ({before} -> {after}){note}"]
