"""A run's durations in steps, whatever unit its config gives them in."""

import dataclasses

from ml_collections import ConfigDict

from train_jax.config.base import steps
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Durations:
    """The run's durations in steps."""

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int

    @classmethod
    def of(cls, config: ConfigDict, epoch_examples: int) -> "Durations":
        """Converts all of them.

        Raises:
          UserError: a duration in two units or none, or a run of no steps.
        """

        def convert(prefix, **options):
            holder = config.optimizer if prefix == "warmup" else config
            return steps(holder, prefix, config.batch_size, epoch_examples, **options)

        total = convert("total")
        if total < 1:
            raise UserError(
                "the run has 0 steps, expected at least one: lengthen config.total_steps (or its other units)"
            )
        log, eval_, checkpoint = (max(convert(name, total_steps=total), 1) for name in ("log", "eval", "checkpoint"))
        return cls(total, convert("warmup", total_steps=total, default=0), log, eval_, checkpoint)
