"""Trains a model and evaluates it.

    python train.py --config=configs/clevr.py [--workdir=DIR] [--config.key=value ...]

The installed `paligemma-jax train` does the same. Calls train_jax.loop.fit(config, workdir), or
train_jax.sweep.run.fit(config, workdir) if the config defines a sweep. A notebook can call the same functions.
"""

from collections.abc import Sequence

from absl import flags

from train_jax.config import command_line
from train_jax.parallel import distributed
from train_jax.system import clock, compilation_cache


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("progress", "auto", ["auto", "bar", "plain", "none"], "how to show progress", flag_values=values)
    flags.DEFINE_bool(
        "print_batch", False, "print a decoded training batch with its masks and exit", flag_values=values
    )
    distributed.define_flags(values)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, workdir, values = command_line.load_from_flags(argv, __doc__ or "", _flags)
    from train_jax import loop  # slow to import, so only after the flags have been checked

    compilation_cache.enable(config.compilation_cache_mb)
    distributed.start_from_flags(values)
    if values.print_batch:
        print(loop.describe_batch(config))
    elif config.sweep.runs:
        from train_jax.sweep import run as sweep

        sweep.fit(config, workdir, values.progress, clock.process_began())
    else:
        loop.fit(config, workdir, values.progress, clock.process_began())
