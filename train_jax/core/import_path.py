"""What a config key names by its import path, `package.module:name`."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


def imported(key: str, path: str | None, form: str = "package.module:function") -> Any:
    """Imports what a config key names by its import path.

    Raises:
      UserError: not of that form, no such module, or no such name in it.
    """
    module_name, _, name = (path or "").partition(":")
    if not module_name or not name:
        raise UserError(f"{key}={path!r}, expected {form!r}: set it to an import path")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, something that it imports does not
        raise UserError(f"{key}={path!r}: there is no module {error.name!r}: correct the import path") from error
    if not hasattr(module, name):
        raise UserError(f"{key}={path!r}: {module_name} has no {name!r}{did_you_mean(name, vars(module))}")
    return getattr(module, name)


def named(key: str, name: str, known: Mapping[str, str]) -> Any:
    """What a config key names: by a short name of `known`, or by an import path of the user's own.

    Args:
      key: of the config, for messages.
      name: its value.
      known: {short name: import path}.

    Raises:
      UserError: neither; as `imported`.
    """
    check_named(key, name, known)
    return imported(key, known.get(name, name))


def check_named(key: str, name: str, known: Iterable[str]) -> None:
    """As `named`, without importing anything. Raises UserError for what is neither."""
    if name not in known and ":" not in str(name):
        raise UserError(
            f"{key} is {name!r}, expected one of {', '.join(known)}, or an import path such as "
            f"'my_package.my_module:function'{did_you_mean(str(name), known)}: change it."
        )
