"""Config keys: defaults, the command line, validation, durations, and what a resumed run may change.

A config file begins from `base_config("package.module:Task")`, and reads its argument by `parse_arg`.
"""

from train_jax.config.arguments import parse_arg, refuse_together
from train_jax.config.base import base_config, check_choices, from_json, leaves, stored_config, to_json

__all__ = [
    "base_config",
    "check_choices",
    "from_json",
    "leaves",
    "parse_arg",
    "refuse_together",
    "stored_config",
    "to_json",
]
