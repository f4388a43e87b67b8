"""Prints the config keys of the runtime or of a task as a table of Markdown.

python -m train_jax.config                               # of every run
python -m train_jax.config paligemma_jax.tasks.vqa:VQA   # of a task
"""

import dataclasses
from collections.abc import Mapping, Sequence

from train_jax.config import command_line
from train_jax.config.base import is_optional, known_keys, leaves, node, task_class, task_defaults
from train_jax.config.run_keys import RunKeys
from train_jax.core.config_keys import Key, declared


def main(argv: Sequence[str]) -> None:
    """Prints the table.

    Raises:
      UserError: more than one argument, or no task of that name.
    """
    expected = "the import path of one task, or nothing"
    tasks, _ = command_line.parse(argv, __doc__, lambda values: None, expected, counts=(0, 1))
    print(task_table(tasks[0]) if tasks else key_table(declared(RunKeys)))


def task_table(task: str) -> str:
    """Returns the table of a task's own keys, and of the runtime's whose defaults it changes; or that there are none.

    Args:
      task: import path of the task.

    Raises:
      UserError: there is no such task.
    """
    keys, defaults = known_keys(task_class(task)), task_defaults(task)
    own = task_class(task).keys
    rows = {} if own is None else declared(own)
    for name, value in leaves(defaults).items():
        if name not in rows:
            kind = node(defaults, name)[0].get_type(node(defaults, name)[1])
            entry = keys.get(name, Key("", value_type=kind, optional=is_optional(defaults, name)))
            rows[name] = dataclasses.replace(entry, default=value)
    if not rows:
        return f"{task} has no config keys of its own; `python -m train_jax.config` prints those of every run."
    return key_table(rows)


def key_table(keys: Mapping[str, Key]) -> str:
    """Returns a table of Markdown with a row for each key."""
    rows = [(f"`{name}`", _default(key), _values(key), key.help, _note(key)) for name, key in keys.items()]
    head = ("key", "default", "values", "meaning", "note")
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    return "depends on the machine" if key.made else f"`{key.default!r}`"


def _values(key: Key) -> str:
    """Returns type and range of a key: "int, 1 or more, or None"."""
    if key.choices is None and key.item_type is None:
        text = ", ".join(filter(None, [key.value_type.__name__, key.bounds()]))
    else:
        text = f"tuple of {key.values()}" if key.item_type is not None and key.choices is None else key.values()
    return f"{text}, or None" if key.optional else text


def _note(key: Key) -> str:
    """Returns what else may change the key: a resumed run ("resume"), or nothing after training ("model")."""
    return "resume" if key.resume_safe else "model" if key.architecture else ""


if __name__ == "__main__":
    command_line.run(main)
