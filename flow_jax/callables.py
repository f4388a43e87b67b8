"""Callables as compiled programs see them: what a callable holds apart from what it is, so that weights are never old.

A callable that is given to `jax.jit` as it is becomes part of the program: the arrays that it reaches are constants of
it, and a program that is kept for it keeps these. `run` takes a callable apart instead, into arrays, which are
arguments of the program, and a hashable rest. Equal rests share a program, whatever the arrays.

What can be taken apart: an `nnx.Module`, all of its state; a bound method of one; a frozen dataclass and its methods;
`functools.partial` and `jax.tree_util.Partial` of these, of arrays, numbers and containers; in any nesting, and in
`jax.jit`, `nnx.jit` or `functools.cache`, which are left out. What its code reads besides, functions and numbers say,
is looked up at each call (code_reads.py), and belongs to the rest.

What cannot, a closure or a function over a module that is a global, an object of another class, is traced anew each
time that it is used: slower, and never out of date. What jax keeps of an earlier trace by itself, for a function in
`jax.jit`, `jax.checkpoint`, `lax.scan`, is not used for either.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from flow_jax.argument_checks import check_function
from flow_jax.code_reads import frozen_fields, is_of_library, is_transformed, read

_TRACED_ANEW = jax.make_user_context(None)  # a new value: what jax.jit, lax.scan and others traced before is not used
_CACHED = type(functools.cache(len))


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
    part = _take_apart(function, found)
    code = read(found.code)
    if code.known:
        return _kept(program)(_Call(part, code.facts), settings, found.arrays, *operands)
    call = _Call(part, ())
    once = jax.jit(functools.partial(_traced, program, call, settings))
    return once(found.arrays, *operands)  # what it compiled goes with it


def call_now(function: Callable, *args):
    """function(*args), as it is now: `jax.jit` and its like keep what they traced, with weights that are old.

    Raises:
      UserError: it cannot be called.
    """
    check_function("what is to be called", function)
    code = read([function])
    if code.known or not code.transformed or _is_known(function):
        return function(*args)
    with _TRACED_ANEW(object()):
        return function(*args)


def _is_known(function: Callable) -> bool:
    """Whether all is known but for the arrays of modules, and no trace is kept over these."""
    found = _Found()
    _take_apart(function, found)
    return not found.left_out and read(found.code).known


@functools.cache
def _kept(program: Callable) -> Callable:
    return jax.jit(functools.partial(_traced, program), static_argnums=(0, 1))


def _traced(program: Callable, call: "_Call", settings: tuple, arrays, *operands):
    with _TRACED_ANEW(object()):
        return program(call, *settings, arrays, *operands)


@dataclasses.dataclass
class _Found:
    """What a callable holds.

    Attributes:
      arrays: arguments of its program.
      code: what its program depends on besides, classes and functions say.
      left_out: there was a wrapper that keeps what it computed or traced.
    """

    arrays: list = dataclasses.field(default_factory=list)
    code: list = dataclasses.field(default_factory=list)
    left_out: bool = False


@dataclasses.dataclass(frozen=True)
class _Call:
    """The hashable rest of a callable: call(arrays, *args) is the callable at these arrays."""

    part: Any
    facts: tuple  # of code_reads

    def __call__(self, arrays, *args):
        return self.part.build(arrays)(*args)


# The hashable rest is a tree of these; `build` puts a value together again, from arrays.


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any

    def build(self, arrays):
        return self.value


@dataclasses.dataclass(frozen=True)
class _Array:
    place: int

    def build(self, arrays):
        return arrays[self.place]


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
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufcV"):
        found.arrays.append(value)
        return _Array(len(found.arrays) - 1)
    if _keeps_results(value):
        found.left_out = found.left_out or not read([value]).known
        return _take_apart(value.__wrapped__, found)
    if type(value) in (tuple, list):
        return _Made(_sequence, (_Constant(type(value)), *(_take_apart(item, found) for item in value)))
    if type(value) is dict:
        return _Made(_mapping, tuple(_take_apart(side, found) for side in (tuple(value), tuple(value.values()))))
    part = None
    if isinstance(value, nnx.Pytree | nnx.Variable):
        part = _module(value, found)
    elif type(value) in (functools.partial, jax.tree_util.Partial):
        part = _partial(value, found)
    elif isinstance(value, types.MethodType):
        part = _method(value, found)
    elif fields := frozen_fields(value):
        part = _dataclass(value, fields, found)
    if part is None:
        found.code.append(value)
        return _Constant(value)
    return part


def _keeps_results(value) -> bool:
    """Whether a callable is one of the user's that `jax.jit` or `functools.cache` wraps: with arrays that are old."""
    compiled = is_transformed(value) and hasattr(value, "lower")
    return (compiled or isinstance(value, _CACHED)) and not is_of_library(value)


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
        if isinstance(value, nnx.Pytree | nnx.Variable):
            found.code.append(type(value))
        if isinstance(value, nnx.Variable):  # what is done to a value that is read or set
            found.code += filter(callable, value.get_metadata().values())
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
    return _Made(types.MethodType, (_take_apart(function, found), _take_apart(owner, found)))


def _dataclass(value, names: tuple[str, ...], found: _Found) -> _Made:
    """A frozen dataclass by its fields; what it has computed from them and kept is computed again."""
    found.code.append(type(value))
    fields = (_take_apart(getattr(value, name), found) for name in names)
    return _Made(_with_fields, (_Constant(type(value)), _Constant(names), *fields))


def _with_fields(kind, names, *values):
    """Without __init__, whose checks want numbers."""
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made
