"""What code may read besides its arguments: globals, closures, defaults, and the attributes of classes.

`read` follows it from functions and classes down to numbers and strings, which are `facts`: code whose facts are equal
does what it did. It does not guess: arrays, modules of weights, objects that may change and code that can look up any
name make it not known. Libraries are taken to hold no weights.
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
_LIBRARIES = _STANDARD | _PACKAGES  # they hold no weights
_LOOKS_AROUND = {"__import__", "eval", "exec", "globals", "vars"}  # names with which code may read anything
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), np.dtype, np.generic)
_BUILT_IN = (  # that do not change
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
    *(types.ClassMethodDescriptorType, types.UnionType, types.GenericAlias, np.ufunc, jnp.ufunc),
    *(jax.sharding.PartitionSpec, jax.sharding.Mesh, jax.sharding.Sharding),
)
_NOT_READ = {  # attributes of every class that its code does not compute with
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__parameters__", "__type_params__"),
}


@dataclasses.dataclass
class Reading:
    """What some code reads.

    Attributes:
      facts: hashable values.
      known: nothing else is read.
      transformed: a callable is read that jax or flax made of one of the user's, `jax.jit(f)` say: it may keep traces.
    """

    facts: tuple
    known: bool
    transformed: bool


def read(values: list) -> Reading:
    """What values are and what their code reads."""
    walk = _Walk()
    try:
        for value in values:
            walk.visit(value)
    except RecursionError:
        walk.known = False
    return Reading((*walk.facts, *walk.attributes()), walk.known, walk.transformed)


def is_library(module: str | None) -> bool:
    """Whether a module belongs to a package that holds no weights."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_transformed(value) -> bool:
    """Whether jax or flax made a callable of another: jit, custom_jvp, checkpoint, grad."""
    home = _home(value) if isinstance(value, types.FunctionType) else type(value).__module__
    return home.partition(".")[0] in ("flax", "jax", "jaxlib") and hasattr(value, "__wrapped__")


class _Walk:
    """Visits what code reads, each object once."""

    def __init__(self):
        self.facts: list = []
        self.known = True
        self.transformed = False
        self._seen: dict[int, int] = {}
        self._held: list = []  # an id is an object's own only as long as it lives
        self._attributes: list[tuple[str, Any]] = []  # plain ones of classes
        self._loaded: set[str] = set()  # names of attributes that code reads
        self._counted: set[str] = set()  # and of those that it adds to

    def visit(self, value) -> None:
        """Adds the facts of a value, and of what it refers to."""
        if isinstance(value, np.generic | np.dtype) or type(value) in _PLAIN:
            self.facts.append(_plain(value))
        elif id(value) in self._seen:
            self.facts.append(("again", self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._held.append(value)
            self._visit_new(value)

    def attributes(self) -> Iterator:
        """Plain attributes of classes, but for counters: what code only adds to has no part in what it returns."""
        for name, value in self._attributes:
            if name not in self._counted or self._loaded.intersection((name, "getattr", "__dict__")):
                yield name, _plain(value)

    def _visit_new(self, value) -> None:
        if isinstance(value, type):
            self._visit_class(value)
        elif is_of_library(value) or isinstance(value, _BUILT_IN) or type(value).__module__ == "typing":
            self.facts.append(value)
        elif is_transformed(value):
            self.transformed = True
            self.facts.append(value)
            self._visit_all(_inside(value))
        elif isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif (parts := _parts(value)) is not None:
            self.facts.append((type(value), len(parts)))
            self._visit_all(parts)
        else:
            self.known = False
            self.visit(type(value))  # whose code may hold what is transformed

    def _visit_all(self, values) -> None:
        for value in values:
            self.visit(value)

    def _visit_function(self, function: types.FunctionType) -> None:
        home = _home(function)
        if home.partition(".")[0] == "jaxtyping":  # checks arguments, then calls it
            self.visit(function.__wrapped__)
            return
        self.facts.append(function)
        self._visit_all(_inside(function))
        if is_library(home):
            return
        self.visit(vars(function))
        for code in _codes(function.__code__):
            names = _names(code)
            self._loaded |= names.loaded
            self._counted |= names.counted
            self.known = self.known and not names.anything
            here = [name for name in names.read if name in function.__globals__]
            self.facts.append(tuple(here))
            self._visit_all(function.__globals__[name] for name in here)

    def _visit_class(self, kind: type) -> None:
        self.facts.append(kind)
        if is_library(kind.__module__):
            return
        self._visit_all((*kind.__mro__[1:], type(kind)))
        for name, item in vars(kind).items():
            if type(item) in _PLAIN:
                self._attributes.append((name, item))
            elif name not in _NOT_READ and not name.startswith("_pytree__"):  # flax's own
                self.facts.append(name)
                self.visit(item)


def _home(function: types.FunctionType) -> str:
    """The module that a function's code is in; wrappers copy __module__."""
    return function.__globals__.get("__name__") or ""


def _plain(value) -> tuple:
    """A number or string as a fact; 1, 1.0 and True are equal, as 0.0 and -0.0 are, and programs of them are not."""
    return type(value), repr(value) if isinstance(value, float | complex | np.generic) else value


def is_of_library(value) -> bool:
    """Whether a library's module is, or has, this value."""
    if isinstance(value, types.ModuleType):
        return is_library(value.__name__)
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(home, str) or not isinstance(name, str) or not is_library(home):
        return False
    found = sys.modules.get(home)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _inside(function) -> list:
    """What a function holds: defaults, and values of its closure; of a callable made of another, that and its rules."""
    if not isinstance(function, types.FunctionType):
        rules = [] if hasattr(function, "lower") else [rule for rule in vars(function).values() if callable(rule)]
        return [function.__wrapped__, *rules]
    return [function.__defaults__, function.__kwdefaults__, *map(_content, function.__closure__ or ())]


def _content(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # it has none, as yet
        return types.CellType


def _parts(value) -> tuple | None:
    """What a value is made of, if that is all there is to it."""
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
    """The names of a frozen dataclass's fields; None if it holds more than they and what it computes from them."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value) or not value.__dataclass_params__.frozen:
        return None
    names = tuple(field.name for field in dataclasses.fields(value))
    others = set(getattr(value, "__dict__", ())) - set(names)
    computed = all(isinstance(getattr(type(value), name, None), functools.cached_property) for name in others)
    return names if computed else None


class _Names(NamedTuple):
    """Names in a piece of code."""

    read: tuple[str, ...]  # that are no local ones
    loaded: frozenset[str]  # of attributes
    counted: frozenset[str]  # of attributes in `a.name += ...`, which loads them as well
    anything: bool  # it may read others


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> _Names:
    steps = list(dis.get_instructions(code))
    read = tuple(dict.fromkeys(s.argval for s in steps if s.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME"))))
    loads = [
        (s.argval, before.opname == "COPY")
        for before, s in zip([steps[0], *steps], steps, strict=False)
        if s.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
    ]
    loaded = frozenset(name for name, counts in loads if not counts)
    anything = any(s.opname.startswith("IMPORT") for s in steps) or not _LOOKS_AROUND.isdisjoint(read)
    return _Names(read, loaded | frozenset(read), frozenset(name for name, counts in loads if counts), anything)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
