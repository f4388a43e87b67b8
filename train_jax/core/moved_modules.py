"""Imports moved modules under their old names, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType


def install(package: str, table: str, names: str = "") -> None:
    """Makes old import paths of a package import the moved modules.

    Args:
      package: name of the package.
      table: one line for each module, with its old and new path below the package.
      names: a line for each renamed name: the new path of its module, its old and its new name. Modules that are
        imported by an old path have both.
    """
    rows = (line.split() for line in table.strip().splitlines())
    renamed: dict[str, list[tuple[str, str]]] = {}
    for module, old, new in (line.split() for line in names.strip().splitlines()):
        renamed.setdefault(f"{package}.{module}", []).append((old, new))
    sys.meta_path.append(_Moved({f"{package}.{old}": f"{package}.{new}" for old, new in rows}, renamed))


class _Package(ModuleType):
    """A package whose exported functions are not overwritten when a submodule of the same name is imported.

    For example, importing the old module `paligemma_jax.generate` does not replace the function `pg.generate`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads moved modules by their old names, after all other finders have failed."""

    def __init__(self, moved: dict[str, str], renamed: dict[str, list[tuple[str, str]]]):
        self._moved, self._renamed = moved, renamed
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(self, fullname, path=None, target=None):
        """Returns a spec for a moved module, None for any other."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self._moved else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Imports the module under its new name and warns."""
        new = self._moved[spec.name]
        warnings.warn(f"{spec.name} has moved: import {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        sys.modules[spec.name.rpartition(".")[0]].__class__ = _Package  # before the old name is set in it
        for old_name, name in self._renamed.get(new, ()):
            setattr(module, old_name, getattr(module, name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restores the spec that the module has under its new name; it has been executed already."""
        assert module.__spec__ is not None, "the import system sets the spec of the old name"
        module.__spec__ = self._specs.pop(module.__spec__.name)
