"""The installed command: `paligemma-jax train|eval|predict|plan|convert [arguments]`.

Each subcommand takes the arguments of the script or module of its name.
"""

import importlib
import sys
from collections.abc import Sequence

from train_jax.config import command_line
from train_jax.core.errors import UserError, quoted
from train_jax.core.patterns import did_you_mean

SUBCOMMANDS = {
    "train": ("train_jax.commands.train", "trains by a config, as train.py does"),
    "eval": ("train_jax.commands.eval", "evaluates a run or a base model, as eval.py does"),
    "predict": ("paligemma_jax.commands.predict", "answers, classifies or draws, as predict.py does"),
    "plan": ("train_jax.plan.planning", "predicts the memory and cost of a run, as python -m train_jax.plan does"),
    "convert": ("paligemma_jax.convert", "converts a checkpoint, as python -m paligemma_jax.convert does"),
}
"""{name: (module with `main(argv)`, what it does)}; a module is imported only when its subcommand is called."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; an error is one line, see `command_line.run`."""
    command_line.run(dispatch, argv)


def dispatch(argv: Sequence[str]) -> None:
    """Hands the arguments after the first to the subcommand that it names.

    Raises:
      UserError: no subcommand, or an unknown one.
      SystemExit: the subcommand ended with an error.
    """
    program, *arguments = argv
    name = arguments[0] if arguments else None
    if name in ("--help", "-help", "-h", "help"):
        print(usage())
        return
    if name not in SUBCOMMANDS:
        fault = "no subcommand" if name is None else f"unknown subcommand {quoted(name)}"
        near = "" if name is None else did_you_mean(name, SUBCOMMANDS)
        raise UserError(f"{fault}, expected one of {', '.join(SUBCOMMANDS)}{near or ': see --help'}")
    module = importlib.import_module(SUBCOMMANDS[name][0])
    command_line.run(module.main, [f"{program} {name}", *arguments[1:]])


def usage() -> str:
    """Returns what --help prints: a line for each subcommand."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
    return "\n".join(
        ["paligemma-jax SUBCOMMAND [arguments]; SUBCOMMAND --help lists the arguments of one.", "", *lines]
    )


if __name__ == "__main__":
    main(sys.argv)
