"""Reads the values in a run's config.json, with the names of earlier releases translated.

`base.from_json` sets them in the base config of the run's task.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from train_jax.config.renamed import RENAMED_TASKS, renamed_keys
from train_jax.core.errors import UserError, quoted
from train_jax.core.patterns import did_you_mean


def parse(text: str) -> dict[str, Any]:
    """Returns the object in the text of a config.json; its task has the present import path.

    Raises:
      UserError: the text is not JSON, or has no task.
    """
    try:
        stored = json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"config.json is not valid JSON ({error}): restore the file") from error
    if not isinstance(stored, dict) or "task" not in stored:
        raise UserError("config.json has no 'task', expected a config written by a run: restore the file")
    task = stored["task"]
    if not isinstance(task, str):
        raise UserError(f"config.json: task={quoted(task)}, expected 'package.module:Class': restore the file")
    return stored | {"task": RENAMED_TASKS.get(task, task)}


def present_values(stored: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the values of a stored config by present dotted key; lists become tuples.

    Args:
      stored: from `parse`.
      known: the present dotted keys of the task's configs.

    Raises:
      UserError: there is no such key, a key is stored under its old and its present name, or a section is no object.
    """
    renamed = renamed_keys(stored["task"])
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    sections = {key[:end] for key in known for end in range(len(key)) if key[end] == "."}
    for old, value in _leaves(stored, known, sections, renamed):
        key = renamed.get(old, old)
        if key not in known:
            raise UserError(f"config.json: {stored['task']} has no key {key!r}{did_you_mean(key, known)}")
        if key in values:
            earlier = {old, names[key]} - {key}
            other = f"and its old name {earlier.pop()!r}" if earlier else "as a key and in its section"
            raise UserError(f"config.json has {key!r} {other}, expected one of them: remove the other")
        values[key], names[key] = _tuples(value), old
    return values | _sweep(values, renamed)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"config.json has the key {repeated!r} twice, expected it once: remove one")
    return dict(pairs)


def _leaves(
    stored: Mapping[str, Any],
    known: Collection[str],
    sections: Collection[str],
    renamed: Mapping[str, str],
    prefix: str = "",
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every value; an old key may have the name of a present section."""
    for name, value in stored.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known and (value or key in sections):
            yield from _leaves(value, known, sections, renamed, f"{key}.")
        elif key in sections and (key not in renamed or value is None):
            raise UserError(f"config.json: {key}={quoted(value)}, expected an object with its keys: restore the file")
        else:
            yield key, value


def _tuples(value: Any) -> Any:
    """Converts lists to tuples: configs contain no lists, as the command line cannot set them."""
    if isinstance(value, dict):  # the overrides of a sweep
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _sweep(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Returns the keys of the sweep whose values are names of config keys, with old names translated."""
    translated: dict[str, Any] = {}
    if isinstance(runs := values.get("sweep.runs"), tuple):
        translated["sweep.runs"] = tuple(_run(run, renamed) for run in runs)
    for key in ("sweep.x", "sweep.series"):
        if isinstance(names := values.get(key), str):
            translated[key] = ",".join(renamed.get(name, name) for name in names.split(","))
    return translated


def _run(run: Any, renamed: Mapping[str, str]) -> Any:
    """Returns a run of a sweep with old keys translated; one of another form unchanged, `sweep.expand` refuses it."""
    if not (isinstance(run, tuple) and len(run) == 2 and isinstance(run[1], dict)):
        return run
    name, overrides = run
    present = {renamed.get(key, key): value for key, value in overrides.items()}
    if len(present) < len(overrides):
        raise UserError(
            f"config.json: run {quoted(name)} of the sweep overrides a key by its old and its present name "
            f"({', '.join(overrides)}), expected one of them: remove the other"
        )
    return name, present
