"""Imports what a config key names by its import path, `package.module:name`."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from train_jax.core.errors import UserError, located
from train_jax.core.patterns import did_you_mean


def imported(key: str, path: str | None, form: str = "package.module:function") -> Any:
    """Imports what a config key names by its import path.

    Args:
      key: of the config, for messages.
      path: value of the key.
      form: expected form of the path, for messages.

    Raises:
      UserError: the path does not have that form, there is no such module, it cannot be imported, or it has no such
        name.
    """
    module_name, _, name = (path or "").partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{key}={path!r}, expected {form!r}: set it to an import path")
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:  # whatever a user's program raises becomes one line that says where
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{key}={path!r}: there is no module {error.name!r}: correct the import path") from error
        raise UserError(f"{key}={path!r}: {module_name} cannot be imported ({located(error)}): correct it") from error
    if not hasattr(module, name):
        raise UserError(f"{key}={path!r}: {module_name} has no {name!r}{did_you_mean(name, vars(module))}")
    return getattr(module, name)


def named(key: str, name: str, short_names: Mapping[str, str]) -> Any:
    """Imports the function that a config key names by a short name in `short_names` or by an import path.

    Args:
      key: of the config, for messages.
      name: value of the key.
      short_names: {short name: import path}.

    Raises:
      UserError: `name` is neither, or not of a function, or as `imported`.
    """
    check_named(key, name, short_names)
    function = imported(key, short_names.get(name, name))
    if not callable(function):
        raise UserError(f"{key}={name!r} is {type(function).__name__}, expected a function: name another")
    return function


def takes(function: Callable, count: int) -> bool:
    """Returns whether a function can be called with `count` positional arguments; True where C hides its signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def check_arguments(what: str, function: Callable, *names: str) -> None:
    """Checks that a function accepts positional arguments, see `takes`.

    Args:
      what: names the function in the message.
      function: to check.
      *names: of the arguments.

    Raises:
      UserError: it requires others.
    """
    if not takes(function, len(names)):
        parameters = inspect.signature(function).parameters.values()
        actual = ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)
        raise UserError(f"{what} takes ({actual}), expected ({', '.join(names)}): correct it")


def check_named(key: str, name: str, short_names: Iterable[str]) -> None:
    """Raises UserError if `name` is neither a short name in `short_names` nor an import path; imports nothing."""
    if name not in short_names and ":" not in str(name):
        raise UserError(
            f"{key} is {name!r}, expected one of {', '.join(short_names)}, or an import path such as "
            f"'my_package.my_module:function'{did_you_mean(str(name), short_names) or ': change it.'}"
        )
