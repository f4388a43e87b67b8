"""Runs a config file: `--config=configs/clevr.py:3b,lr=1e-4` is `get_config("3b,lr=1e-4")` of configs/clevr.py."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from train_jax.config.renamed import RENAMED_KEYS, renamed_keys
from train_jax.config.validate import check_keys
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments
from train_jax.core.patterns import did_you_mean


def load_config(config_flag: str) -> ConfigDict:
    """Returns what `get_config` of a config file returns, locked.

    Args:
      config_flag: "configs/clevr.py", or "configs/clevr.py:3b,lr=1e-4" where the text after the colon is its argument.

    Raises:
      UserError: no such file, no `get_config`, an argument to one that takes none, an error inside it, or keys other
        than those of its task.
    """
    name, colon, arg = config_flag.partition(":")
    path = Path(name)
    if not path.is_file():
        beside = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"--config={config_flag}: there is no file {name}{did_you_mean(name, beside)}")
    module = _run(config_flag, path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={config_flag}: {name} defines no get_config(), expected a config file: add it")
    arguments = [arg] if colon else []
    _check_arguments(config_flag, get_config, arguments)
    config = _call(config_flag, path, get_config, *arguments)
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={config_flag}: get_config returned {type(config).__name__}, expected a ConfigDict")
    check_keys(config)
    return config.lock()


def _run(config_flag: str, path: Path) -> ModuleType:
    """Returns the module of a config file."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={config_flag}: {path} is not a Python file, expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    _make_importable(path)
    _call(config_flag, path, spec.loader.exec_module, module)
    return module


def _check_arguments(config_flag: str, get_config: Callable, arguments: list[str]) -> None:
    """Raises UserError if `get_config` takes no argument and one is given, or requires one and none is given."""
    name, parameters = config_flag.partition(":")[0], inspect.signature(get_config).parameters.values()
    if arguments and not parameters:
        raise UserError(f"--config={config_flag}: get_config takes no argument: write --config={name}")
    if not arguments and any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise UserError(f"--config={config_flag}: get_config requires an argument: write --config={name}:ARGUMENT")
    check_arguments(f"--config={config_flag}: get_config", get_config, *arguments)


def _call(config_flag: str, path: Path, function: Callable, *arguments: Any) -> Any:
    """Calls code of a config file; whatever it raises becomes one line that says where."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(
            f"--config={config_flag}: {_where(error, path)}the file exits ({error.code}), expected it to return a "
            "config: remove the call of exit"
        ) from error
    except Exception as error:
        raise UserError(f"--config={config_flag}: {_where(error, path)}{_one_line(error)}") from error


def _make_importable(path: Path) -> None:
    """Lets a config import from its own folder, as `configs`, and from the current one.

    A script has its own folder on the path; an installed command has neither.
    """
    for folder in (str(path.resolve().parents[1]), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)


def _where(error: BaseException, path: Path) -> str:
    """Returns "line 12: " for the innermost line of the config file that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError):
        lines = [error.lineno] if error.lineno else []
    return f"line {lines[-1]}: " if lines else ""


def _one_line(error: Exception) -> str:
    """Returns the error as one line; of ml_collections' long list of fields only its guess is kept."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    renamed = re.match(r"'?(?:Key \"|Could not override field ')(\w+)", text)
    renames = {old: new for task in (None, *RENAMED_KEYS) for old, new in renamed_keys(task).items()}
    if renamed and renamed[1] in renames:
        return f"config.{renamed[1]} is now config.{renames[renamed[1]]}: write that"
    wrong = re.match(
        r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type (.*) and cannot .*", text
    )
    if wrong:
        wanted = re.sub(r".*\W(\w+)'>$", r"\1", text)
        value = "another section" if wrong[2].strip() in ("", "{}") else wrong[2]
        return f"the key {wrong[1]!r} is set to {value}, expected {'a section' if wanted == 'ConfigDict' else wanted}"
    guess = re.search(r"[Dd]id you mean \"([^\"]+)\" instead of \"([^\"]+)\"", text)
    if guess:
        return f"there is no key {guess[2]!r}; did you mean {guess[1]!r}?"
    return f"{type(error).__name__}: {text}"
