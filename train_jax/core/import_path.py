"""What a config key names by its import path, `package.module:name`."""

import importlib
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
