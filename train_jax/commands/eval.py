"""Evaluates: python eval.py --workdir=DIR [--split=validation] [--checkpoint=best|latest|STEP] [--config.key=value ...]

The config is the workdir's config.json. With --config=FILE and no workdir, the base model of that config is evaluated,
as it is before training, into runs/<config>-base. The installed `paligemma-jax eval` does the same. The work is done by
train_jax.loop.evaluate(config, workdir, split, checkpoint).
"""

from absl import flags

from train_jax.config import command_line
from train_jax.parallel import distributed
from train_jax.system import clock


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("split", None, "data split; the config's validation split when absent", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    distributed.define_flags(values)


def main(argv: list[str]) -> None:
    """Parses the flags and calls the loop."""
    config, workdir, values = command_line.load_from_flags(argv, __doc__, _flags)
    from train_jax import loop  # slow to import: mistakes in the flags are reported first

    distributed.start_from_flags(values)
    if values.workdir is None:
        workdir += "-base"
    loop.evaluate(config, workdir, values.split, values.checkpoint, clock.process_began())
