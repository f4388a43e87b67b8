"""python -m train_jax.plan --config=FILE; see planning.py."""

from train_jax.config import command_line
from train_jax.plan.planning import main

if __name__ == "__main__":
    command_line.run(main)
