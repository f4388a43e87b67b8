"""Callables as compiled programs see them: what a callable holds apart from what it is, so that weights are never old.

A callable that is given to `jax.jit` as it is becomes part of the program: the arrays that it reaches are constants of
it, and a program that is kept for it keeps these. `run` takes a callable apart instead, into arrays, which are
arguments of the program, and a hashable rest. Equal rests share a program, whatever the arrays.

What can be taken apart: an `nnx.Module`, all of its state; a bound method of one; a frozen dataclass and its methods;
`functools.partial` and `jax.tree_util.Partial` of these, of arrays, numbers and containers; in any nesting. So can a
function that reads nothing but its arguments and libraries. What cannot, a closure or a function over a module that is
a global, an object of another class, is traced anew each time that it is used: slower, and never out of date.
"""

import dataclasses
import dis
import enum
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_VALUES = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type, np.generic, np.dtype)
_LIBRARIES = ("builtins", "flax", "flow_jax", "jax", "jaxlib", "math", "numpy", "operator")  # hold no weights
_LOOKS_AROUND = {"__import__", "eval", "exec", "globals", "vars"}  # names with which a function may read anything


def run(program: Callable, function: Callable, settings: tuple, *operands):
    """`program(call, *settings, arrays, *operands)`, compiled, where call(arrays, *args) is function(*args).

    It is compiled once for all functions that differ in their arrays alone, settings and shapes.

    Args:
      program: a function of a module, without state.
      function: the callable that the program evaluates.
      settings: hashable values that the program depends on.
      operands: trees of arrays.
    """
    found = _Found()
    call = _Call(_take_apart(function, found))
    if found.known:
        return _kept(program)(call, settings, found.arrays, *operands)

    def once(arrays, *operands):
        return program(call, *settings, arrays, *operands)

    return jax.jit(once)(found.arrays, *operands)  # what it compiles and holds goes with it


@functools.cache
def _kept(program: Callable) -> Callable:
    def at(call, settings, arrays, *operands):
        return program(call, *settings, arrays, *operands)

    return jax.jit(at, static_argnums=(0, 1))


@dataclasses.dataclass
class _Found:
    """What a callable holds: its arrays, and whether all the rest is known."""

    arrays: list = dataclasses.field(default_factory=list)
    known: bool = True


@dataclasses.dataclass(frozen=True)
class _Call:
    """The hashable rest of a callable: call(arrays, *args) is the callable at these arrays."""

    part: Any

    def __call__(self, arrays, *args):
        return self.part.build(arrays)(*args)


# The hashable rest is a tree of these; `build` puts a value together again, from arrays.


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any
    kind: type  # 1, 1.0 and True are equal, and programs of them are not

    def build(self, arrays):
        return self.value


@dataclasses.dataclass(frozen=True, eq=False)
class _Unknown:
    """What cannot be taken apart, as it is; equal to nothing but itself."""

    value: Any

    def build(self, arrays):
        return self.value


@dataclasses.dataclass(frozen=True)
class _Array:
    place: int

    def build(self, arrays):
        return arrays[self.place]


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function, and the values of the names that it reads."""

    function: Callable
    reads: Any

    def build(self, arrays):
        return self.function


@dataclasses.dataclass(frozen=True)
class _Made:
    make: Callable
    parts: tuple

    def build(self, arrays):
        return self.make(*(part.build(arrays) for part in self.parts))


@dataclasses.dataclass(frozen=True)
class _Module:
    graph: Any
    place: int
    attributes: tuple  # ((path, part), ...) of what is no state of the module

    def build(self, arrays):
        module = nnx.merge(self.graph, arrays[self.place], copy=True)  # whose variables a call may set
        for path, part in self.attributes:
            if isinstance(part, _Made | _Module):
                _set_entry(module, path, part.build(arrays))
        return module


def _set_entry(module, path: tuple, value) -> None:
    *nodes, name = path
    for key in nodes:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    setattr(module, name, value)


def _take_apart(value, found: _Found):
    """The hashable rest of a value."""
    if isinstance(value, _VALUES):
        return _Constant(value, type(value))
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufcV"):
        found.arrays.append(value)
        return _Array(len(found.arrays) - 1)
    if type(value) in (tuple, list):
        return _Made(_sequence, (_Constant(type(value), type), *(_take_apart(item, found) for item in value)))
    if type(value) is dict:
        return _Made(_mapping, tuple(_take_apart(side, found) for side in (tuple(value), tuple(value.values()))))
    if isinstance(value, nnx.Pytree | nnx.Variable):
        part = _module(value, found)
    elif isinstance(value, functools.partial):
        part = _partial(value, found)
    elif isinstance(value, types.MethodType):
        part = _method(value, found)
    elif dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen:
        part = _dataclass(value, found)
    else:
        part = _function(value)
    if part is None:
        found.known = False
        return _Unknown(value)
    return part


def _sequence(kind, *items):
    return kind(items)


def _mapping(keys, values):
    return dict(zip(keys, values, strict=True))


def _module(module, found: _Found) -> _Module | None:
    """A module: its graph, its state, and what its attributes are besides."""
    try:
        graph, state = nnx.split(module)
        hash(graph)
    except (TypeError, ValueError):
        return None
    place, attributes = len(found.arrays), []
    found.arrays.append(state)
    for path, value in nnx.iter_graph(module):
        inside = isinstance(value, (nnx.Pytree, nnx.Variable, jax.Array, np.ndarray, tuple, list, dict))
        if path and not inside and not str(path[-1]).startswith("_pytree__"):
            part = _take_apart(value, found)
            attributes.append((path, part))
            if isinstance(part, _Made | _Module) and not isinstance(path[-1], str):
                return None  # an entry of a container
    if held := [path for path, part in attributes if isinstance(part, _Made | _Module)]:
        module = nnx.merge(graph, state, copy=True)
        for path in held:  # they are put back when the module is built
            _set_entry(module, path, None)
        graph, found.arrays[place] = nnx.split(module)
    return _Module(graph, place, tuple(attributes))


def _partial(value: functools.partial, found: _Found) -> _Made:
    args, keywords = value.args, value.keywords
    if isinstance(value, jax.tree_util.Partial):  # says of itself that numbers are arrays
        args, keywords = jax.tree.map(_number_as_array, (args, keywords), is_leaf=lambda x: isinstance(x, nnx.Pytree))
    return _Made(_bind, tuple(_take_apart(part, found) for part in (value.func, args, keywords)))


def _number_as_array(value):
    return np.asarray(value) if isinstance(value, float | complex) else value


def _bind(function, args, keywords):
    return functools.partial(function, *args, **keywords)


def _method(value: types.MethodType, found: _Found) -> _Made | None:
    """A bound method; what its class defines is code."""
    owner, function = value.__self__, value.__func__
    name = getattr(function, "__name__", None)
    if not any(vars(kind).get(name) is function for kind in type(owner).__mro__):
        return None
    return _Made(types.MethodType, (_Constant(function, type(function)), _take_apart(owner, found)))


def _dataclass(value, found: _Found) -> _Made | None:
    """A frozen dataclass by its fields; what it has computed from them and kept is computed again."""
    kind, names = type(value), tuple(field.name for field in dataclasses.fields(value))
    others = set(getattr(value, "__dict__", ())) - set(names)
    if any(not isinstance(getattr(kind, name, None), functools.cached_property) for name in others):
        return None
    fields = (_take_apart(getattr(value, name), found) for name in names)
    return _Made(_with_fields, (_Constant(kind, type), _Constant(names, tuple), *fields))


def _with_fields(kind, names, *values):
    """Without __init__, whose checks want numbers."""
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _function(value) -> _Constant | _Function | None:
    """A function whose every program is the same, as long as what it reads is."""
    if isinstance(value, np.ufunc) or (isinstance(value, types.ModuleType) and _is_library(value.__name__)):
        return _Constant(value, type(value))
    if isinstance(value, jnp.ufunc) and getattr(jnp, value.__name__, None) is value:
        return _Constant(value, type(value))
    if isinstance(value, types.FunctionType):
        reads = _reads(value)
    elif hasattr(value, "__wrapped__") and _is_library(type(value).__module__):  # of jax.jit, jax.custom_jvp
        reads = _function(value.__wrapped__)
    else:
        return None
    return None if reads is None else _Function(value, reads)


def _is_library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES


def _reads(function: types.FunctionType) -> _Made | None:
    """What a function may read besides its arguments, to tell whether it has changed; None if that may be anything."""
    home = function.__globals__["__name__"]  # __module__ is copied by wrappers
    if home.split(".")[0] == "jaxtyping":  # checks arguments, then calls it
        return _reads(function.__wrapped__)
    found = _Found()
    try:
        held = [function.__defaults__, function.__kwdefaults__]
        held += [cell.cell_contents for cell in function.__closure__ or ()]
        held += [] if _is_library(home) else _globals(function)
        part = _take_apart(held, found)
    except (LookupError, RecursionError, ValueError):  # it looks around; it calls itself; a cell is empty
        return None
    return part if found.known and not found.arrays else None


def _globals(function: types.FunctionType) -> list:
    """The values of the names that a function's code has among its globals, attributes of that name included.

    Raises:
      LookupError: it may read others.
    """
    found = []
    for code in _codes(function.__code__):
        imports = any(step.opname.startswith("IMPORT") for step in dis.get_instructions(code))
        if imports or _LOOKS_AROUND.intersection(code.co_names):
            raise LookupError
        found += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
