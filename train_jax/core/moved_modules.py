"""Import paths of before: a module that has moved is found under its old name, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType


def install(package: str, table: str) -> None:
    """Makes old import paths of a package lead to the modules as they are now.

    Args:
      package: its name.
      table: a line for each module, its old and its new path below the package.
    """
    rows = (line.split() for line in table.strip().splitlines())
    sys.modules[package].__class__ = _Package
    sys.meta_path.append(_Moved({f"{package}.{old}": f"{package}.{new}" for old, new in rows}))


class _Package(ModuleType):
    """Keeps the functions that it exports: an import binds a module to its last name, `pg.generate` among them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder has found, by its new name."""

    def __init__(self, moved: dict[str, str]):
        self._moved = moved
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(self, fullname, path=None, target=None):
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self._moved else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = self._moved[spec.name]
        warnings.warn(f"{spec.name} has moved: import {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module is as it was imported under its new name, and describes itself so."""
        module.__spec__ = self._specs.pop(module.__spec__.name)
