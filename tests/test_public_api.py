"""Public names keep their address and their parameters, which tests/public_api.txt lists.

A line has a name and its parameters with defaults; "!" marks a keyword-only parameter. Add a line for a new public
name; removing a line is a breaking change.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

import flow_jax as fj
import paligemma_jax as pg
import train_jax

LINES = (Path(__file__).parent / "public_api.txt").read_text(encoding="utf-8").splitlines()


def parameters(function) -> str:
    """Formats the parameters of a function as in the file."""
    return f"({', '.join(map(parameter, inspect.signature(function).parameters.values()))})"


def parameter(one: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(one.kind, "")
    default = ""
    if one.default is not inspect.Parameter.empty:
        default = "=" + (one.default.__name__ if inspect.isfunction(one.default) else repr(one.default))
    return f"{stars}{one.name}{default}{'!' if one.kind is inspect.Parameter.KEYWORD_ONLY else ''}"


def test_public_names_stay():
    result = []
    for line in LINES:
        name, _, rest = line.partition("(")
        value = {"pg": pg, "fj": fj}[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        result.append(f"{name}{parameters(value)}" if rest else name)
    assert result == LINES


def packages() -> list:
    """Returns our three packages and all packages in them."""
    result = [train_jax, pg, fj]
    for package in result:  # grows by the packages in each
        inside = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        result += [importlib.import_module(module.name) for module in inside if module.ispkg]
    return result


def test_no_submodule_has_the_name_of_an_exported_function():
    for package in packages():
        functions = {name for name, value in vars(package).items() if inspect.isfunction(value)}
        inside = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert not functions & inside, package.__name__
