"""A run's durations in steps, whatever unit its config gives them in."""

import dataclasses

from ml_collections import ConfigDict

from train_jax.config.base import steps
from train_jax.config.run_keys import UNITS
from train_jax.core.config_keys import WHOLE_MAX
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
          UserError: a duration in two units or none, too many steps for JAX's 32-bit integers, or as `check_length`.
        """

        def convert(prefix, **options):
            holder = config.optimizer if prefix == "warmup" else config
            return steps(holder, prefix, config.batch_size, epoch_examples, **options)

        check_length(config)
        total = convert("total")
        if total > WHOLE_MAX:
            raise UserError(f"the run takes {total:,} steps, expected at most {WHOLE_MAX:,}: shorten it")
        log, eval_, checkpoint = (max(convert(name, total_steps=total), 1) for name in ("log", "eval", "checkpoint"))
        return cls(total, convert("warmup", total_steps=total, default=0), log, eval_, checkpoint)


def check_length(config: ConfigDict) -> None:
    """Raises UserError if a run that trains has no steps; needs no data."""
    for unit in UNITS:
        if config.get(f"total_{unit}") == 0:  # not every duration has every unit
            raise UserError(f"config.total_{unit}=0 trains nothing, expected a number above 0: lengthen the run")
