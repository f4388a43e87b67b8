"""Checks of a finished config before anything is compiled: each failure is one sentence and names the key."""

from typing import Any

import jax
from ml_collections import ConfigDict

from train_jax.config.base import base_config, check_declared, leaves, node, steps, wrong_type
from train_jax.config.renamed import renamed_keys
from train_jax.config.run_keys import DURATIONS
from train_jax.core.config_keys import has_type
from train_jax.core.errors import UserError, quoted
from train_jax.core.patterns import did_you_mean
from train_jax.optim import optimizers
from train_jax.parallel.sharding import mesh_shape, row_divisor


def validate(config: ConfigDict, training: bool = True, device_count: int | None = None) -> None:
    """Checks keys, types, ranges, durations and the batch against `base_config(config.task)` and the devices.

    Initialises JAX's backend, so several processes call `jax.distributed.initialize` first.

    Args:
      config: the complete config.
      training: also check that the training batch fits the devices; a run may be evaluated on others.
      device_count: devices of the run; None for those that JAX has.

    Raises:
      UserError: for the first fault.
    """
    base = check_keys(config)
    for key, value in leaves(config).items():
        _check_type(key, value, base)
    check_declared(config)
    _check_best_metric(config)
    optimizers.check(config.optimizer)
    _check_durations(config)
    if training:
        _check_batch(config, device_count or jax.device_count(), jax.process_count())


def unknown_key(key: str, config: ConfigDict) -> UserError:
    """Returns the error for a dotted key that `config` does not have; it names the new one, or the nearest."""
    new = renamed_keys(config.get("task")).get(key)
    if new is not None:
        return UserError(f"config.{key} is now config.{new}: write that")
    inner = [name.removeprefix(f"{key}.") for name in leaves(config) if name.startswith(f"{key}.")]
    if inner:
        return UserError(
            f"config.{key} is a section, expected one of its keys ({', '.join(inner)}): write config.{key}.{inner[0]}"
        )
    return UserError(f"there is no key config.{key}{did_you_mean(key, leaves(config))}")


def check_keys(config: ConfigDict) -> ConfigDict:
    """Checks that `config` has the keys of its task's base config, which is returned, and no others.

    Raises:
      UserError: the first key too many (with the nearest right one) or too few.
    """
    base = base_config(config.get("task"))
    actual, expected = leaves(config), leaves(base)
    for key in actual:
        if key not in expected:
            raise unknown_key(key, base)
    for key in expected:
        if key not in actual:
            raise UserError(f"config.{key} is missing: start the config from base_config({config.task!r})")
    return base


def _check_type(key: str, value: Any, base: ConfigDict) -> None:
    wanted = wrong_type(base, key, value)
    if wanted is not None:
        actual, remedy = ("", "set a value") if value is None else (f" is {type(value).__name__}", "change it")
        raise UserError(f"config.{key}={quoted(value)}{actual}, expected {wanted.__name__}: {remedy}")
    parent, name = node(base, key)
    default = parent[name]
    if isinstance(value, tuple) and isinstance(default, tuple) and default and not _same_structure(value, default):
        kind = "pair" if _is_pair(default) else "tuple"
        raise UserError(f"config.{key}={quoted(value)}, expected a {kind} like {default!r}: change it")


def _is_pair(default: tuple) -> bool:
    """Returns whether a default is one pair of values, such as two numbers, and no list of pairs."""
    return len(default) == 2 and not any(isinstance(item, tuple) for item in default)


def _same_structure(value: Any, default: Any) -> bool:
    """Returns whether `value` has the structure of `default`: a pair for a pair, else elements of the same type.

    This refuses `--config.betas=0.5`, which ml_collections silently reads as `(0.5,)`.
    """
    if not isinstance(default, tuple):
        return has_type(value, type(default))
    if not isinstance(value, tuple):
        return False
    if _is_pair(default):
        return len(value) == 2 and all(map(_same_structure, value, default))
    return not default or all(any(_same_structure(item, kind) for kind in default) for item in value)


def _check_best_metric(config: ConfigDict) -> None:
    """Raises UserError if a key needs a best metric and none is named."""
    if config.best_metric is None and (config.patience is not None or config.load_best_at_end):
        asking = "load_best_at_end" if config.load_best_at_end else "patience"
        raise UserError(f"config.{asking} is set but config.best_metric is None: name the metric that decides")


def _check_durations(config: ConfigDict) -> None:
    """Checks that every duration has one unit; the data count as one example here."""
    for duration in DURATIONS:
        parent, prefix = node(config, duration)
        optional = 0 if prefix == "warmup" else None
        steps(parent, prefix, config.batch_size, epoch_examples=1, total_steps=1, default=optional)
    if config.total_epochs is None and config.optimizer.warmup_epochs is None:
        total = steps(config, "total", config.batch_size)
        warmup = steps(config.optimizer, "warmup", config.batch_size, total_steps=total, default=0)
        if total:  # 0 where nothing trains: see durations.check_length
            optimizers.check_warmup(warmup, total)


def _check_batch(config: ConfigDict, device_count: int, process_count: int) -> None:
    batch = config.batch_size
    chunk = config.micro_batch or batch
    if batch % chunk:
        divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise UserError(
            f"config.batch_size={batch} does not divide into micro-batches of {chunk}: set config.micro_batch to one "
            f"of {divisors}"
        )
    shape = mesh_shape(config.mesh, device_count, process_count)
    parts = row_divisor(shape)
    if chunk % parts:
        name = "batch_size" if config.micro_batch is None else "micro_batch"
        raise UserError(
            f"config.{name}={chunk} does not divide over the mesh's data={shape['data']} x fsdp={shape['fsdp']} "
            f"devices: use a multiple of {parts}, or fewer devices with config.mesh.data"
        )
