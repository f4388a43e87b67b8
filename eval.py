"""Evaluates: `python eval.py --help`. The flags are read by train_jax/commands/eval.py."""

from train_jax.commands.eval import main
from train_jax.config import command_line

__all__ = ["main"]


if __name__ == "__main__":
    command_line.run(main)
