"""Evaluates a checkpoint of a run, or a base model.

    python eval.py --workdir=DIR [--split=validation] [--checkpoint=best|latest|STEP] [--config.key=value ...]

The config is the workdir's config.json. With --config=FILE and no workdir, evaluates the model of that config before
training and writes to runs/<config>-base. The installed `paligemma-jax eval` does the same. Calls
train_jax.loop.evaluate(config, workdir, split, checkpoint).
"""

from collections.abc import Sequence

from absl import flags

from train_jax.config import command_line
from train_jax.parallel import distributed
from train_jax.system import clock, compilation_cache


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("split", None, "data split; the config's validation split when absent", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and evaluates."""
    config, workdir, values = command_line.load_from_flags(argv, __doc__ or "", _flags)
    from train_jax import loop  # slow to import, so only after the flags have been checked

    compilation_cache.enable(config.compilation_cache_mb)
    distributed.start_from_flags(values)
    if values.workdir is None:
        workdir += "-base"
    loop.evaluate(config, workdir, values.split, values.checkpoint, clock.process_began())
