"""Finds the values that code may read besides its arguments: globals, closures, defaults and class attributes.

`read` follows references from functions and classes down to numbers and strings, the `facts`: code whose facts are
equal computes the same function. It does not guess: if it meets an array, a module with weights, a mutable object, or
code that can look up any name, the facts are not `complete`. Libraries are assumed to hold no weights.
"""

import dataclasses
import dis
import enum
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

_STANDARD = {"abc", "builtins", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "itertools"}
_STANDARD |= {"math", "numbers", "operator", "types", "typing", "warnings"}
_PACKAGES = {"beartype", "chex", "diffrax", "einops", "equinox", "flax", "flow_jax", "jax", "jaxlib", "jaxtyping"}
_PACKAGES |= {"ml_dtypes", "numpy", "optax", "scipy", "train_jax", "typing_extensions"}
_LIBRARIES = _STANDARD | _PACKAGES  # assumed to hold no weights
_READS_ANY_NAME = {"__import__", "eval", "exec", "globals", "vars"}  # functions by which code may read any name
_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...), np.dtype, np.generic)
_IMMUTABLE = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
    *(types.ClassMethodDescriptorType, types.UnionType, types.GenericAlias, np.ufunc, jnp.ufunc),
    *(jax.sharding.PartitionSpec, jax.sharding.Mesh, jax.sharding.Sharding),
)
_BOOKKEEPING = {  # attributes of a class that its code does not compute with
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__parameters__", "__type_params__"),
}


@dataclasses.dataclass
class CodeFacts:
    """The values that some code reads.

    Attributes:
      facts: hashable values.
      complete: the code reads nothing else.
      transformed: the code calls a user's function that jax or flax transformed, such as `jax.jit(f)`, which may cache
        its traces.
    """

    facts: tuple
    complete: bool
    transformed: bool


def read(values: list) -> CodeFacts:
    """Returns the facts of values and of the code that they refer to."""
    visitor = _Visitor()
    try:
        for value in values:
            visitor.visit(value)
    except RecursionError:
        visitor.complete = False
    return CodeFacts((*visitor.facts, *visitor.attributes()), visitor.complete, visitor.transformed)


def is_library(module: str | None) -> bool:
    """Returns whether a module belongs to a package that is assumed to hold no weights."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_transformed(value) -> bool:
    """Returns whether a callable is the result of a transformation of jax or flax, such as jit, checkpoint or grad."""
    module = _defining_module(value) if isinstance(value, types.FunctionType) else type(value).__module__
    return module.partition(".")[0] in ("flax", "jax", "jaxlib") and hasattr(value, "__wrapped__")


class _Visitor:
    """Collects the facts of code, visiting each object once."""

    def __init__(self):
        self.facts: list = []
        self.complete = True
        self.transformed = False
        self._seen: dict[int, int] = {}
        self._references: list = []  # keeps visited objects alive, so that their ids stay unique
        self._attributes: list[tuple[str, Any]] = []  # scalar attributes of classes
        self._loaded: set[str] = set()  # names of the attributes that code reads
        self._incremented: set[str] = set()  # names of the attributes in `a.name += ...`

    def visit(self, value) -> None:
        """Adds the facts of a value and of everything that it refers to."""
        if isinstance(value, np.generic | np.dtype) or type(value) in _SCALARS:
            self.facts.append(_scalar_fact(value))
        elif id(value) in self._seen:
            self.facts.append(("again", self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._references.append(value)
            self._visit_new(value)

    def attributes(self) -> Iterator:
        """Yields scalar class attributes, except counters: an attribute that code only increments affects no result."""
        for name, value in self._attributes:
            if name not in self._incremented or self._loaded.intersection((name, "getattr", "__dict__")):
                yield name, _scalar_fact(value)

    def _visit_new(self, value) -> None:
        if isinstance(value, type):
            self._visit_class(value)
        elif is_of_library(value) or isinstance(value, _IMMUTABLE) or type(value).__module__ == "typing":
            self.facts.append(value)
        elif is_transformed(value):
            self.transformed = True
            self.facts.append(value)
            self._visit_all(_references_of(value))
        elif isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif (parts := _parts(value)) is not None:
            self.facts.append((type(value), len(parts)))
            self._visit_all(parts)
        else:
            self.complete = False
            self.visit(type(value))  # its code may call a transformed function

    def _visit_all(self, values) -> None:
        for value in values:
            self.visit(value)

    def _visit_function(self, function: types.FunctionType) -> None:
        module = _defining_module(function)
        if module.partition(".")[0] == "jaxtyping":  # a wrapper that checks arguments
            self.visit(function.__wrapped__)
            return
        self.facts.append(function)
        self._visit_all(_references_of(function))
        if is_library(module):
            return
        self.visit(vars(function))
        for code in _codes(function.__code__):
            names = _names(code)
            self._loaded |= names.loaded
            self._incremented |= names.incremented
            self.complete = self.complete and not names.unbounded
            defined = [name for name in names.globals if name in function.__globals__]
            self.facts.append(tuple(defined))
            self._visit_all(function.__globals__[name] for name in defined)

    def _visit_class(self, kind: type) -> None:
        self.facts.append(kind)
        if is_library(kind.__module__):
            return
        self._visit_all((*kind.__mro__[1:], type(kind)))
        for name, item in vars(kind).items():
            if type(item) in _SCALARS:
                self._attributes.append((name, item))
            elif name not in _BOOKKEEPING and not name.startswith("_pytree__"):  # flax's
                self.facts.append(name)
                self.visit(item)


def _defining_module(function: types.FunctionType) -> str:
    """Returns the module that contains a function's code; `__module__` is not reliable, as wrappers copy it."""
    return function.__globals__.get("__name__") or ""


def _scalar_fact(value) -> tuple:
    """Returns a number or string with its type.

    1, 1.0 and True are equal, as are 0.0 and -0.0, but programs of them differ.
    """
    return type(value), repr(value) if isinstance(value, float | complex | np.generic) else value


def is_of_library(value) -> bool:
    """Returns whether a value is a library's module, or an object that a library's module defines."""
    if isinstance(value, types.ModuleType):
        return is_library(value.__name__)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not is_library(module):
        return False
    target = sys.modules.get(module)
    for part in name.split("."):
        target = getattr(target, part, None)
    return target is value


def _references_of(function) -> list:
    """Returns a function's defaults and closure.

    Of a transformed callable, these are the function that it wraps and its derivative rules.
    """
    if not isinstance(function, types.FunctionType):
        rules = [] if hasattr(function, "lower") else [rule for rule in vars(function).values() if callable(rule)]
        return [function.__wrapped__, *rules]
    return [function.__defaults__, function.__kwdefaults__, *map(_cell_contents, function.__closure__ or ())]


def _cell_contents(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty so far
        return types.CellType


def _parts(value) -> tuple | None:
    """Returns the values that determine a value completely; None if there are none."""
    kind = type(value)
    if kind in (tuple, list, set, frozenset):
        return tuple(value)
    if kind in (dict, types.MappingProxyType, FrozenDict):
        return (*value, *value.values())
    if kind in (functools.partial, jax.tree_util.Partial, functools.partialmethod):
        return value.func, value.args, value.keywords
    if kind in (types.MethodType, staticmethod, classmethod):
        return value.__func__, getattr(value, "__self__", None)
    if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
        return value.__name__, value.__self__
    if kind is property:
        return value.fget, value.fset, value.fdel
    if kind is functools.cached_property:
        return (value.func,)
    if isinstance(value, enum.Enum):
        return kind, value.name, value.value
    names = frozen_fields(value)
    return names and (kind, *(getattr(value, name) for name in names))


def frozen_fields(value) -> tuple[str, ...] | None:
    """Returns the fields of a frozen dataclass that stores only these and cached properties; None for other objects."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return None
    if not value.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]  (not in typeshed)
        return None
    names = tuple(field.name for field in dataclasses.fields(value))
    others = set(getattr(value, "__dict__", ())) - set(names)
    computed = all(isinstance(getattr(type(value), name, None), functools.cached_property) for name in others)
    return names if computed else None


class _Names(NamedTuple):
    """The names in a code object.

    Attributes:
      globals: names that are not local.
      loaded: names of attributes that are read.
      incremented: names of attributes in `a.name += ...`.
      unbounded: the code may read any other name.
    """

    globals: tuple[str, ...]
    loaded: frozenset[str]
    incremented: frozenset[str]
    unbounded: bool


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> _Names:
    steps = list(dis.get_instructions(code))
    names = tuple(dict.fromkeys(s.argval for s in steps if s.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME"))))
    loads = [
        (s.argval, before.opname == "COPY")  # `a.name += ...` copies `a` before it loads the attribute
        for before, s in zip([steps[0], *steps], steps, strict=False)
        if s.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
    ]
    loaded = frozenset(name for name, increments in loads if not increments)
    incremented = frozenset(name for name, increments in loads if increments)
    unbounded = any(s.opname.startswith("IMPORT") for s in steps) or not _READS_ANY_NAME.isdisjoint(names)
    return _Names(names, loaded | frozenset(names), incremented, unbounded)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a code object and those nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
