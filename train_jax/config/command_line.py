"""Parses the command line of the entry points: `--config=FILE:arg --config.key=value --workdir=DIR`.

The config is the result of `get_config(arg)` in a file, or the `config.json` of a workdir. absl parses the arguments,
with a flag for each key of the config; ml_collections parses the values of the keys, one at a time. Every error is one
sentence about one flag or key. Each call has its own `FlagValues`, so that a process may call `main` repeatedly.
"""

import errno
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from train_jax.config.base import base_config, is_optional, leaves, node, read_config
from train_jax.config.config_file import load_config
from train_jax.config.run_keys import DURATIONS, UNITS
from train_jax.config.validate import unknown_key
from train_jax.core.errors import UserError, quoted
from train_jax.core.patterns import did_you_mean

PATH_FAULTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
ABSL_FLAGS = ("flagfile", "undefok")  # absl adds these to every FlagValues
Define = Callable[[flags.FlagValues], None]
"""Adds flags: `lambda values: flags.DEFINE_bool("x", False, "...", flag_values=values)`."""


def run(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Calls `main(argv)`; prints a `UserError` as one line and exits with its status (2).

    An `OSError` about a path is printed in the same way; other errors keep their traceback.
    """
    argv = sys.argv if argv is None else argv
    program = _program(argv[0])
    try:
        main(argv)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command resumes from the latest checkpoint.", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in PATH_FAULTS or error.filename is None:
            raise
        fault = f"{error.filename} cannot be used ({error.strerror})"
        print(f"{program}: error: {fault}: correct the path or its permissions.", file=sys.stderr)
        sys.exit(UserError.exit_status)


def _program(path: str) -> str:
    """Returns the name of a program for messages: "train.py", or "python -m train_jax.plan" of a package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if Path(path).name == "__main__.py" and spec is not None:
        return f"python -m {spec.parent}"
    return Path(path).name


def load_from_flags(
    argv: Sequence[str], usage: str | None = None, define: Define | None = None
) -> tuple[ConfigDict, str, flags.FlagValues]:
    """Returns the config with all overrides, the workdir, and the values of the entry point's own flags.

    Args:
      argv: like `sys.argv`, with the program's name first.
      usage: text that --help prints before the flags.
      define: adds the entry point's own flags.

    Returns:
      (config, workdir, values): the config is locked; a flag `x` is `values.x`.

    Raises:
      UserError: the command line or the config file has a mistake.
      SystemExit: after --help, with status 0.
    """

    def define_all(values: flags.FlagValues) -> None:
        text = "FILE.py or FILE.py:argument; without it, the workdir's own"
        flags.DEFINE_string("config", None, text, flag_values=values)
        text = "folder of the run (default: runs/<config and argument>)"
        flags.DEFINE_string("workdir", None, text, flag_values=values)
        if define:
            define(values)

    values, rest = read_flags(argv, usage, define_all, "Flags (--config.KEY=VALUE overrides a key)")
    for name in ("config", "workdir"):
        if values[name].value == "":
            raise UserError(f"--{name} is empty, expected a path: write it, or leave the flag out")
    config, workdir = _load(values.config, values.workdir)
    override(config, parse_overrides(rest, config, list(values)))
    return config, workdir, values


def parse(
    argv: Sequence[str], usage: str | None, define: Define, expected: str, counts: Sequence[int] = (2,)
) -> tuple[list[str], flags.FlagValues]:
    """Parses flags and positional arguments, such as SRC and DST; returns the arguments and the flags' values.

    Args:
      argv: like `sys.argv`, with the program's name first; flags may be anywhere.
      usage: text that --help prints before the flags.
      define: adds the flags.
      expected: the positional arguments, as an error names them: "SRC DST".
      counts: allowed numbers of positional arguments.

    Raises:
      UserError: a flag is wrong, or the number of arguments is.
      SystemExit: after --help, with status 0.
    """
    values, arguments = read_flags(argv, usage, define)
    for argument in arguments:
        if argument.startswith("-"):
            raise _unknown_flag(argument, values, ": see --help")
    if len(arguments) not in counts:
        raise UserError(f"found {' '.join(arguments) or 'nothing'}, expected {expected}: see --help")
    return arguments, values


def read_flags(
    argv: Sequence[str], usage: str | None, define: Define, title: str = "Flags"
) -> tuple[flags.FlagValues, list[str]]:
    """Returns the values of an entry point's flags, and the remaining arguments.

    Args:
      argv: like `sys.argv`, with the program's name first.
      usage: text that --help prints before the flags.
      define: adds the flags.
      title: heading of the flags.

    Raises:
      UserError: a flag has no value or a wrong one.
      SystemExit: after --help, with status 0.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    define(values)
    flags.DEFINE_bool("help", False, "print this", short_name="h", flag_values=values)
    try:
        rest = values(list(argv), known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        raise UserError(f"{error}: correct the flag") from error
    if values.help:
        print(f"{(usage or '').strip()}\n\n{title}:\n{flags_help(values)}")
        raise SystemExit(0)
    return values, rest


def _unknown_flag(argument: str, names: Iterable[str], hint: str) -> UserError:
    """Returns the error for an argument that is no flag; it names the nearest flag, or else gives the hint."""
    near = did_you_mean(argument.lstrip("-").partition("=")[0], names)
    return UserError(f"unknown argument {quoted(argument)}{near or hint}")


def flags_help(values: flags.FlagValues) -> str:
    """Returns a line for each flag, without those that absl adds of its own."""
    texts = {name: values[name].help for name in sorted(values) if name not in (*ABSL_FLAGS, "h")}
    width = max(map(len, texts))
    return "\n".join(f"  --{name.ljust(width)}  {text}" for name, text in texts.items())


def default_workdir(config_flag: str) -> str:
    """Returns the workdir of a --config value: configs/clevr.py:3b,qlora -> runs/clevr-3b-qlora."""
    path, _, arg = config_flag.partition(":")
    words = [Path(path).stem, *filter(None, arg.split(","))]
    return "runs/" + "-".join(re.sub(r"[^\w.=+-]", "_", word) for word in words)


def _load(config_flag: str | None, workdir: str | None) -> tuple[ConfigDict, str]:
    if config_flag is not None:
        return load_config(config_flag), workdir or default_workdir(config_flag)
    if workdir is None:
        raise UserError("neither --config nor --workdir is given, expected one: add --config=configs/<name>.py")
    stored = Path(workdir) / "config.json"
    if not stored.is_file():
        raise UserError(f"{stored} does not exist, expected a workdir of a run: correct --workdir, or give --config")
    return read_config(stored), workdir


def parse_overrides(rest: Sequence[str], config: ConfigDict, flag_names: list[str]) -> dict[str, str]:
    """Returns {dotted key: text} for the --config.key arguments; if a key is repeated, the last value counts.

    Raises:
      UserError: another argument, a key that the config does not have, or a key without a value.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for key in leaves(config):
        parent, name = node(config, key)
        is_bool = parent.get_type(name) is bool  # may be given without a value, or as --noconfig.KEY
        flag = flags.Flag(flags.ArgumentParser(), None, f"config.{key}", None, "", boolean=is_bool)
        flags.DEFINE_flag(flag, flag_values=values)
    try:
        unknown = values(["", *rest], known_only=True)[1:]
    except flags.Error as error:  # the last argument lacks its value
        raise _override_error(rest[-1], config, flag_names) from error
    except ValueError as error:
        raise UserError(f"{error}: correct the flag") from error
    if unknown:
        raise _override_error(unknown[0], config, flag_names)
    given = {key: values[f"config.{key}"] for key in leaves(config)}
    return {key: str(flag.value) for key, flag in given.items() if flag.present}


def _override_error(argument: str, config: ConfigDict, flag_names: list[str]) -> UserError:
    """Returns the error for an argument that is not a --config.key of the config, or has no value."""
    name = argument.lstrip("-").partition("=")[0].removeprefix("no")
    if not argument.startswith("-") or not name.startswith("config."):
        return _unknown_flag(argument, flag_names, "; write --flag=value, or --config=FILE for a config")
    key = name.removeprefix("config.")
    if key not in leaves(config):
        return unknown_key(key, config)
    return UserError(f"{quoted(argument)} has no value: write --config.{key}=VALUE")


def override(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Sets keys of `config` to values given as text; "None" empties a placeholder.

    A duration replaces the config's own in any unit: `total_steps` on the command line clears `total_epochs` of the
    file.

    Raises:
      UserError: a key is unknown, a text is not a value of the key's type, or one duration is given in two units.
    """
    for duration in DURATIONS:
        keys = [f"{duration}_{unit}" for unit in UNITS]
        given = [key for key in keys if overrides.get(key, "None") != "None"]
        if len(given) > 1:
            raise UserError(f"--config.{given[0]} and --config.{given[1]} are both given, expected one: leave one out")
        parent, _ = node(config, duration)
        for name in (key.rpartition(".")[2] for key in keys):
            if given and name in parent:
                parent[name] = None
    for key, text in overrides.items():
        if key not in leaves(config):
            raise unknown_key(key, config)
        if text == "None" and is_optional(config, key):
            parent, name = node(config, key)
            parent[name] = None
        else:
            _set(config, key, text)
    if "task" in overrides:
        _check_same_keys(config)


def _check_same_keys(config: ConfigDict) -> None:
    """Raises UserError if the config has keys that its task, which the command line names, does not have."""
    known = leaves(base_config(config.task))
    unknown = next((key for key in leaves(config) if key not in known), None)
    if unknown is not None:
        raise UserError(
            f"config.task={config.task!r} has no key {unknown!r} of this config, expected a task with the same keys: "
            "write a config file for the task"
        )


def _set(config: ConfigDict, key: str, text: str) -> None:
    argument = f"--config.{key}={text}"
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", argument])
        values(["", argument])
    except (flags.Error, ValueError, TypeError) as error:
        parent, name = node(config, key)
        raise UserError(
            f"config.{key}={quoted(text)}, expected {parent.get_type(name).__name__}: change the value"
        ) from error
