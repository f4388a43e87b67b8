"""`Configurable`, what the config package reads from the class that `config.task` names."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from train_jax.core.config_keys import config_dict


class Configurable:
    """A class with config keys of its own; `train_jax.task.Task` is one."""

    keys: type | None = None
    """Dataclass of the task's own config keys, beside the runtime's (train_jax/core/config_keys.py)."""

    resume_safe_keys: Sequence[str] = ()
    """Patterns of keys that a resumed run may change, for keys that `defaults` returns without a declaration."""

    architecture_keys: Sequence[str] = ()
    """Patterns of keys that shape the model and that an evaluation may not change, also without a declaration."""

    @classmethod
    def defaults(cls) -> ConfigDict:
        """Returns the task's own config keys with their default values, by default from `keys`."""
        return ConfigDict() if cls.keys is None else config_dict(cls.keys)
