"""Trains as a config says: python train.py --config=configs/clevr.py [--workdir=DIR] [--config.key=value ...]

The work is done by train_jax.loop.fit(config, workdir), which a notebook may call as well; of a config that is a sweep
by train_jax.sweep.fit(config, workdir).
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
    """Parses the flags and calls the loop."""
    config, workdir, values = command_line.load_from_flags(argv, __doc__, _flags)
    from train_jax import loop  # slow to import: after mistakes in the flags have been told

    distributed.start_from_flags(values)
    if values.print_batch:
        print(loop.describe_batch(config))
    elif config.sweep:
        from train_jax.sweep import run as sweep

        sweep.fit(config, workdir, values.progress, clock.process_began())
    else:
        loop.fit(config, workdir, values.progress, clock.process_began())


if __name__ == "__main__":
    command_line.run(main)
