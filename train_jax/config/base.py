"""Creates configs from the keys of the runtime and of a task, and reads and writes them as JSON.

A config file is a short program: `get_config(arg)` takes `base_config("package.module:Task")`, which is locked, and
changes some values, so that a misspelt key raises an error in the line that sets it. Keys are declared in `run_keys.py`
and by tasks; `validate.py` checks a config, `command_line.py` applies `--config.key=value`, and `resume_check.py`
compares two configs of one run.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from train_jax.config import stored as stored_values
from train_jax.config.configurable import Configurable
from train_jax.config.renamed import RENAMED_HOOKS, RENAMED_TASKS
from train_jax.config.run_keys import DURATIONS as DURATIONS
from train_jax.config.run_keys import UNITS, RunKeys
from train_jax.core.config_keys import Key, check_values, config_dict, declared, has_type
from train_jax.core.errors import UserError, located, quoted
from train_jax.core.import_path import check_arguments, imported


def runtime_defaults() -> ConfigDict:
    """Returns every key that the runtime reads, with its default."""
    return config_dict(RunKeys)


def known_keys(task: type[Configurable]) -> dict[str, Key]:
    """Returns the declarations of the keys of the runtime and of a task class, by dotted name."""
    return declared(RunKeys) | ({} if task.keys is None else declared(task.keys))


def steps(
    config: Mapping[str, Any] | ConfigDict,
    prefix: str,
    batch_size: int,
    epoch_examples: int | None = None,
    total_steps: int | None = None,
    default: int | None = None,
) -> int:
    """Returns the duration `prefix` of `config` in updates.

    It is set by exactly one of `{prefix}_steps`, `_epochs` (passes over the data), `_examples` and `_percent` (of
    `total_steps`, 0 to 1 as in big_vision). Rounds to the nearest step; a duration above 0 is at least one step.

    Args:
      config: contains the keys; `config.optimizer` for the prefix "warmup".
      prefix: "total", "log", "eval", "checkpoint" or "warmup".
      batch_size: examples per update.
      epoch_examples: size of the training data; None if it is unknown or unlimited.
      total_steps: length of the run, for percent.
      default: returned if no unit is set; None raises an error instead.

    Raises:
      UserError: two units or none are set, or the unit needs a size that is None.
    """
    units = [f"{prefix}_{unit}" for unit in UNITS if f"{prefix}_{unit}" in config]
    given = {name: config[name] for name in units if config[name] is not None}
    if len(given) > 1:
        settings = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{settings} are both set, expected exactly one of {', '.join(units)}: set the others to None")
    if not given:
        if default is not None:
            return default
        raise UserError(f"the duration {prefix!r} is not set, expected exactly one of {', '.join(units)}: set one")
    ((name, value),) = given.items()
    unit = name.removeprefix(f"{prefix}_")
    known = {"epochs": epoch_examples, "percent": total_steps}
    if unit in known and known[unit] is None:
        reason = "the size of the training data" if unit == "epochs" else "the length of the run"
        raise UserError(f"{name}={value} needs {reason}, which is not known here: set {prefix}_steps instead")
    per_unit = {
        "steps": 1.0,
        "epochs": (epoch_examples or 0) / batch_size,
        "examples": 1 / batch_size,
        "percent": total_steps or 0,
    }[unit]
    return max(1, round(value * per_unit)) if value else 0


def task_class(path: str | None) -> type:
    """Imports the class that `config.task` names.

    Raises:
      UserError: as for `imported`, the task has moved, it is no `Configurable`, or it defines a hook that has
        been renamed.
    """
    if path in RENAMED_TASKS:
        raise UserError(f"config.task={path!r} has moved: write {RENAMED_TASKS[path]!r}")
    task = imported("config.task", path, "package.module:Class")
    if not isinstance(task, type) or not issubclass(task, Configurable):
        kind = f"the class {task.__name__}" if isinstance(task, type) else type(task).__name__
        raise UserError(
            f"config.task={path!r} is {kind}, expected a subclass of train_jax.task.Task: derive it, or name another"
        )
    for old, new in RENAMED_HOOKS.items():
        if hasattr(task, old):
            raise UserError(f"config.task={path!r} defines {old}, which is now {new}: rename it")
    return task


def base_config(task: str | None) -> ConfigDict:
    """Returns the runtime's defaults updated by the task's `defaults()`, locked: only existing keys can be set.

    Args:
      task: import path "package.module:Class" of a `Configurable`.
    """
    config = runtime_defaults()
    try:
        _merge(config, task_defaults(task))
    except TypeError as error:  # another type than the runtime's
        raise UserError(f"{task}.defaults() changes the type of a key ({error}): correct it") from error
    config.task = task
    return config.lock()


def task_defaults(task: str | None) -> ConfigDict:
    """Returns what `defaults()` of a task returns.

    Raises:
      UserError: as `task_class`, or `defaults()` fails or returns something else.
    """
    defaults = task_class(task).defaults
    check_arguments(f"{task}.defaults", defaults)
    try:
        config = defaults()
    except UserError:
        raise
    except Exception as error:  # whatever a user's program raises becomes one line that says where
        raise UserError(f"{task}.defaults() failed ({located(error)}): correct it") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{task}.defaults() returned {type(config).__name__}, expected a ConfigDict: correct it")
    return config


def _merge(base: ConfigDict, extra: ConfigDict) -> None:
    """Updates `base` like `ConfigDict.update`, which cannot replace one placeholder by another."""
    for key, value in extra.items(preserve_field_references=True):
        if isinstance(value, ConfigDict) and key in base:
            _merge(base[key], value)
        else:
            if isinstance(value, FieldReference) and key in base:
                del base[key]
            base[key] = value


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns {"optimizer.learning_rate": 1e-3, ...}: every value by its dotted key."""
    flat = {}
    for key, value in config.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def node(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the inner config that holds the dotted `key`, and the key's last part."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config[parent]
    return config, name


def is_optional(config: ConfigDict, key: str) -> bool:
    """Returns whether the dotted `key` may be None: it is a placeholder, whatever its current value."""
    parent, name = node(config, key)
    return isinstance(dict(parent.items(preserve_field_references=True))[name], FieldReference)


def wrong_type(config: ConfigDict, key: str, value: Any) -> type | None:
    """Returns the type of the dotted `key` if `value` is not of it, else None.

    A key that holds None and is no placeholder has no type.
    """
    parent, name = node(config, key)
    wanted = parent.get_type(name)
    if value is None:
        return None if parent[name] is None or is_optional(config, key) else wanted
    return None if wanted is type(None) or has_type(value, wanted) else wanted


def to_json(config: ConfigDict) -> str:
    """Returns the config with references resolved, as JSON; tuples become lists."""
    return config.to_json_best_effort(indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote, locked; the task's base config restores tuples and types.

    A key that the text lacks, as an earlier release did not have it, has its default.

    Raises:
      UserError: the text is not JSON or names no task, the task has no such key, or a value has another type.
    """
    stored = stored_values.parse(text)
    config = base_config(stored["task"])
    for key, value in stored_values.present_values(stored, leaves(config)).items():
        wanted = wrong_type(config, key, value)
        if wanted is not None:
            raise UserError(f"config.json: {key}={quoted(value)}, expected {wanted.__name__}: restore the file")
        parent, name = node(config, key)
        parent[name] = value
    return config


def read_config(file: Path) -> ConfigDict:
    """Returns the config in a config.json; raises UserError as `from_json`, or if it is no text."""
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"config.json is not UTF-8 text ({error.reason}): restore the file") from error


def stored_config(workdir: Path) -> ConfigDict:
    """Returns the config of the run in a workdir with checkpoints.

    Raises:
      UserError: there is no config.json, or as for `read_config`.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(
            f"{workdir} holds checkpoints but no config.json: restore the file, or choose another --workdir"
        )
    return read_config(file)


def check_choices(config: ConfigDict, choices: Mapping[str, Iterable[str]]) -> None:
    """Checks that keys have one of the given values; for keys that are declared without `choices`.

    Args:
      config: to check.
      choices: the allowed values by dotted key.

    Raises:
      UserError: for the first key with another value.
    """
    check_values({name: Key("", choices=tuple(allowed)) for name, allowed in choices.items()}, leaves(config))


def check_declared(config: ConfigDict) -> None:
    """Checks every value against the choices and the range that its key declares.

    Raises:
      UserError: for the first value outside of them.
    """
    check_values(known_keys(task_class(config.task)), leaves(config))
