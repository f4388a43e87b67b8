"""Answers, classifies or draws: `python predict.py --help`. The flags are read by paligemma_jax/commands/predict.py."""

from paligemma_jax.commands.predict import main
from train_jax.config import command_line

__all__ = ["main"]


if __name__ == "__main__":
    command_line.run(main)
