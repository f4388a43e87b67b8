"""Configs: the runtime's keys and their defaults, a task's own beside them, and their way to disk and back.

A config file is a short program: `get_config(arg)` takes `base_config("package.module:Task")`, which is locked, and
sets what differs, so a misspelt key fails where it is written. `validate.py` checks the result, `command_line.py`
applies `--config.key=value`, `resume_check.py` compares two configs of one run.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from train_jax.config.renamed import RENAMED_KEYS, RENAMED_TASKS
from train_jax.core.errors import UserError
from train_jax.core.import_path import imported
from train_jax.core.patterns import did_you_mean

UNITS = ("steps", "epochs", "examples", "percent")
DURATIONS = ("total", "log", "eval", "checkpoint", "optimizer.warmup")


def runtime_defaults() -> ConfigDict:
    """Returns every key that the runtime reads, with its default; a placeholder is typed and may stay None."""
    config = ConfigDict()
    config.task = placeholder(str)  # import path of the task, "package.module:Class"
    config.seed = 0  # of initialisation, shuffling and dropout; the same seed gives the same run

    # Length of the run: set exactly one.
    config.update(_duration("total", "steps", "epochs", "examples"))
    config.batch_size = 32  # examples of one update, over all devices
    config.micro_batch = placeholder(int)  # examples computed at once, over all devices; None = all. Same mathematics.
    config.compute_dtype = "float32"  # float32 | bfloat16 | float16 (with dynamic loss scaling)

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # the names that train_jax/optim/optimizers.py knows
    optimizer.learning_rate = 1e-3  # the peak, after warm-up
    optimizer.schedule = "constant"  # constant | linear | cosine | rsqrt, after warm-up
    optimizer.update(_duration("warmup", *UNITS))  # at most one; none = no warm-up
    optimizer.warmup_constant = placeholder(float)  # learning rate all through the warm-up; None = a ramp from 0
    optimizer.end_factor = 0.0  # linear and cosine end at learning_rate * end_factor
    optimizer.rsqrt_timescale = 10_000.0  # rsqrt: updates until the rate has fallen to learning_rate / sqrt(2)
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.momentum = 0.0  # of sgd and adafactor; 0 = none
    optimizer.min_8bit_size = 4096  # of adamw_8bit: moments of smaller leaves stay in float32
    optimizer.weight_decay = 0.0  # decoupled; multiplied by the rate of the step, as in AdamW
    optimizer.weight_decay_mask = placeholder(str)  # pattern of the paths that decay; None = matrices and embeddings
    optimizer.grad_clip_norm = placeholder(float)  # global norm over all trainable leaves; None = no clipping
    # ((pattern, factor) or (pattern, factor, warmup_steps), ...): multiplies the rate of matching paths, first wins.
    optimizer.rates = ()

    config.ema_decay = placeholder(float)  # of an average of the trainable parameters, per update; None = none kept

    # How often: set exactly one of each.
    for prefix in ("log", "eval", "checkpoint"):
        config.update(_duration(prefix, *UNITS))
    config.best_metric = placeholder(str)  # a key of the evaluation's metrics; None = keep the latest checkpoint only
    config.best_mode = "max"  # max | min
    config.load_best_at_end = False
    config.patience = placeholder(int)  # evaluations in a row without improvement that end the run; None = never
    config.max_bad_steps = 1  # updates in a row with a non-finite loss or gradient that stop the run

    # Devices along each axis; -1 = all that the others leave. Only the product of data and fsdp splits the batch.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # Runs instead of one: ((name, {dotted key: value}), ...), each in a folder of its name in the workdir
    # (sweep/run.py).
    config.sweep = ()
    config.sweep_metric = placeholder(str)  # of eval.json, to compare the runs by; None = best_metric, else "loss"
    # Numeric config key, or a number of eval.json such as "trainable_parameters": the plot's x; None = one bar a run.
    config.sweep_x = placeholder(str)
    config.sweep_series = placeholder(str)  # config key, or keys joined by commas, that tell the plot's lines apart
    config.sweep_more = ()  # further numbers of eval.json: columns of the table, and a panel of the plot each
    config.sweep_curves = ()  # lists of [x, y] in eval.json: a panel each, with a line for every group of runs

    config.data = data = ConfigDict()
    data.workers = 0  # processes that read; 0 = threads of this process, faster unless decoding holds the GIL
    data.threads = 2  # that read batches ahead; 0 = none
    data.on_error = "skip"  # skip: a bad row is logged and gets weight 0 | raise
    data.max_bad_fraction = 0.01  # 0 to 1: share of bad rows above which the run stops
    return config


def _duration(prefix: str, *units: str) -> dict[str, FieldReference]:
    """Returns one placeholder per unit; steps and examples are whole numbers, epochs and percent are not."""
    return {f"{prefix}_{unit}": placeholder(int if unit in ("steps", "examples") else float) for unit in units}


def steps(
    config: Mapping[str, Any] | ConfigDict,
    prefix: str,
    batch_size: int,
    epoch_examples: int | None = None,
    total_steps: int | None = None,
    default: int | None = None,
) -> int:
    """Returns the duration `prefix` of `config` in updates.

    `{prefix}_steps`, `_epochs` (passes over the data), `_examples` or `_percent` (of `total_steps`, 0 to 1 as in
    big_vision) gives it; exactly one may be set. Rounds to the nearest step, and a duration above 0 is at least one.

    Args:
      config: holds the keys; `config.optimizer` for the prefix "warmup".
      prefix: "total", "log", "eval", "checkpoint" or "warmup".
      batch_size: examples of one update.
      epoch_examples: size of the training data; None where it has no end.
      total_steps: length of the run, for percent.
      default: the answer when no unit is set; None = that is an error.

    Raises:
      UserError: two units, none, a negative number, or a unit that needs what is not known.
    """
    units = [f"{prefix}_{unit}" for unit in UNITS if f"{prefix}_{unit}" in config]
    given = {name: config[name] for name in units if config[name] is not None}
    if len(given) > 1:
        found = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{found} are both set, expected exactly one of {', '.join(units)}: set the others to None")
    if not given:
        if default is not None:
            return default
        raise UserError(f"the duration {prefix!r} is not set, expected exactly one of {', '.join(units)}: set one")
    ((name, value),) = given.items()
    unit = name.removeprefix(f"{prefix}_")
    if value < 0 or (unit == "percent" and value > 1):
        expected = "a fraction from 0 to 1" if unit == "percent" else "0 or more"
        raise UserError(f"{name}={value}, expected {expected}: change it")
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
    """Imports the class that `config.task` names. Raises UserError as `imported`, and for a path of before."""
    if path in RENAMED_TASKS:
        raise UserError(f"config.task={path!r} has moved: write {RENAMED_TASKS[path]!r}")
    return imported("config.task", path, "package.module:Class")


def base_config(task: str | None) -> ConfigDict:
    """Returns the runtime's defaults with the task's `defaults()` over them, locked: only existing keys can be set.

    Args:
      task: import path "package.module:Class"; the class has a static `defaults() -> ConfigDict`.
    """
    config = runtime_defaults()
    _merge(config, task_class(task).defaults())
    config.task = task
    return config.lock()


def _merge(base: ConfigDict, extra: ConfigDict) -> None:
    """As `ConfigDict.update`, which however refuses a placeholder in both."""
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
    """Returns True if the dotted `key` may be None: it was declared as a placeholder, whatever it holds now."""
    parent, name = node(config, key)
    return isinstance(dict(parent.items(preserve_field_references=True))[name], FieldReference)


def to_json(config: ConfigDict) -> str:
    """Returns the config with references resolved, as JSON; tuples become lists."""
    return config.to_json_best_effort(indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote, locked: tuples and types come back from the task's base config.

    Raises:
      UserError: not JSON, no task, a key that the task does not have (any more), or a value of another type.
    """
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config.json is not valid JSON ({error}): restore the file") from error
    if not isinstance(stored, dict) or "task" not in stored:
        raise UserError("config.json has no 'task', expected a config written by a run: restore the file")
    stored["task"] = RENAMED_TASKS.get(stored["task"], stored["task"])
    config = base_config(stored["task"])
    known = leaves(config)
    renamed = RENAMED_KEYS.get(stored["task"], {})
    for key, value in leaves(ConfigDict(stored)).items():
        key = renamed.get(key, key)
        if key not in known:
            raise UserError(f"config.json: {stored['task']} has no key {key!r}{did_you_mean(key, known)}")
        parent, name = node(config, key)
        try:
            parent[name] = _tuples(value)
        except TypeError as error:
            raise UserError(f"config.json: {key}={value!r}, expected {parent.get_type(name).__name__}") from error
    return config


def stored_config(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir that holds checkpoints."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(
            f"{workdir} holds checkpoints but no config.json: restore the file, or choose another --workdir"
        )
    return from_json(file.read_text(encoding="utf-8"))


def _tuples(value: Any) -> Any:
    """Configs hold tuples, never lists (the command line cannot set those), so every list of JSON is a tuple."""
    if isinstance(value, dict):  # the overrides of a sweep
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the argument after the colon of `--config=configs/x.py:3b,lr=1e-4`.

    Args:
      arg: comma-separated flags (`3b` sets a bool to True) and `key=value` pairs; None or "" keeps the defaults.
      **defaults: every accepted key. A value is read with its default's type; with None as default, as a number if it
        looks like one, else as text. Keys that are no identifiers: `parse_arg(arg, **{"3b": False})["3b"]`.

    Raises:
      UserError: an unknown key, or a value that the key's type cannot read.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            expected = ", ".join(defaults) or "none"
            raise UserError(f"config argument {item!r}: expected one of {expected}{did_you_mean(key, defaults)}")
        values[key] = _parse_value(key, text if equals else None, defaults[key])
    return ConfigDict(values)


def _parse_value(key: str, text: str | None, default: Any) -> Any:
    wanted = type(default)
    if text is None:
        if wanted is not bool:
            raise UserError(f"config argument {key!r} needs a value: write {key}={default}")
        return True
    if wanted is bool:
        choices = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in choices:
            raise UserError(f"config argument {key}={text!r}, expected true or false: change it")
        return choices[text.lower()]
    if default is None:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        return wanted(text)
    except ValueError as error:
        raise UserError(f"config argument {key}={text!r}, expected {wanted.__name__}: change it") from error


def check_choices(config: ConfigDict, choices: Mapping[str, Iterable[str]]) -> None:
    """Checks config keys, dotted, that hold one of a few words.

    Raises:
      UserError: the first that does not.
    """
    values = leaves(config)
    for key, allowed in choices.items():
        if values[key] not in allowed:
            expected = ", ".join(word or "''" for word in allowed)
            raise UserError(f"{key} is {values[key]!r}, expected one of {expected}: change it.")
