"""Trains: `python train.py --help`. The flags are read by train_jax/commands/train.py."""

from train_jax.commands.train import main
from train_jax.config import command_line

__all__ = ["main"]


if __name__ == "__main__":
    command_line.run(main)
