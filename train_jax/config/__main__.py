"""Prints the config keys of the runtime or of a task as a table of Markdown.

python -m train_jax.config                               # of every run
python -m train_jax.config paligemma_jax.tasks.vqa:VQA   # of a task
"""

from collections.abc import Mapping, Sequence

from train_jax.config import command_line
from train_jax.config.base import task_class
from train_jax.config.run_keys import RunKeys
from train_jax.core.config_keys import Key, declared
from train_jax.core.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Prints the table.

    Raises:
      UserError: more than one argument, or no task of that name.
    """
    if len(argv) > 2 or argv[1:2] == ["--help"]:
        raise UserError(f"found {' '.join(argv[1:])}, expected the import path of a task, or nothing: see the README")
    print(task_table(argv[1]) if argv[1:] else key_table(declared(RunKeys)))


def task_table(task: str) -> str:
    """Returns the table of a task's own keys; `task` is its import path.

    Raises:
      UserError: there is no such task.
    """
    keys = task_class(task).keys
    return key_table({} if keys is None else declared(keys))


def key_table(keys: Mapping[str, Key]) -> str:
    """Returns a table of Markdown with a row for each key."""
    rows = [(f"`{name}`", _default(key), _values(key), key.help, _note(key)) for name, key in keys.items()]
    head = ("key", "default", "values", "meaning", "note")
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    return "of the machine" if key.made else f"`{key.default!r}`"


def _values(key: Key) -> str:
    optional = " or None" if key.optional else ""
    return (key.values() or key.value_type.__name__) + optional


def _note(key: Key) -> str:
    """What a resumed run or an evaluation may change."""
    return "resume" if key.resume_safe else "model" if key.architecture else ""


if __name__ == "__main__":
    command_line.run(main)
