"""Trains by a config: python train.py --config=configs/clevr.py [--workdir=DIR] [--config.key=value ...]

The installed `paligemma-jax train` does the same. The work is done by train_jax.loop.fit(config, workdir), and for a
sweep by train_jax.sweep.fit(config, workdir), which a notebook may call as well.
"""

from absl import flags

from train_jax.config import command_line
from train_jax.parallel import distributed
from train_jax.system import clock


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("progress", "auto", ["auto", "bar", "plain", "none"], "how to show progress", flag_values=values)
    flags.DEFINE_bool(
        "print_batch", False, "show a decoded training batch with its masks, and stop", flag_values=values
    )
    distributed.define_flags(values)


def main(argv: list[str]) -> None:
    """Parses the flags and calls the loop, or the sweep."""
    config, workdir, values = command_line.load_from_flags(argv, __doc__, _flags)
    from train_jax import loop  # slow to import: mistakes in the flags are reported first

    distributed.start_from_flags(values)
    if values.print_batch:
        print(loop.describe_batch(config))
    elif config.sweep.runs:
        from train_jax.sweep import run as sweep

        sweep.fit(config, workdir, values.progress, clock.process_began())
    else:
        loop.fit(config, workdir, values.progress, clock.process_began())
