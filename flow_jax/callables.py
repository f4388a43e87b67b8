"""Splits callables into arrays and a hashable rest, so that compiled programs never use outdated weights.

A callable passed to `jax.jit` directly becomes part of the program: the arrays that it refers to are constants, and the
cached program keeps them. `run` splits a callable into its arrays, which are arguments of the program, and a hashable
rest. Callables with equal rests share one program, whatever their arrays.

Callables that can be split: an `nnx.Module`, with all of its state; a bound method of one; a frozen dataclass and its
methods; `functools.partial` and `jax.tree_util.Partial` of these and of arrays, numbers and containers; nested in any
way, also inside `jax.jit`, `nnx.jit` or `functools.cache`, which are removed. The functions, numbers and strings that
their code reads are looked up at each call (code_reads.py) and belong to the rest.

Every other callable, such as a closure, a function that reads a global module, or an object of another class, is traced
and compiled at each call: this is slow, but never outdated. The traces that jax itself caches, for functions inside
`jax.jit`, `jax.checkpoint` or `lax.scan`, are not reused in either case.
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

_TRACE_CONTEXT = jax.make_user_context(None)  # with a new value, jax.jit, lax.scan and others reuse no cached trace
_CACHED_FUNCTION = type(functools.cache(len))


def run(program: Callable, function: Callable, settings: tuple, *operands):
    """Returns `program(call, *settings, arrays, *operands)`, compiled, where call(arrays, *args) is function(*args).

    The program is compiled once for all functions that differ only in their arrays, and for equal settings and shapes.

    Args:
      program: a module-level function without state.
      function: the callable that the program evaluates.
      settings: hashable values that the program depends on.
      operands: pytrees of arrays.
    """
    contents = _Contents()
    part = _split(function, contents)
    code = read(contents.code)
    if code.complete:
        return _compiled(program)(_Call(part, code.facts), settings, contents.arrays, *operands)
    call = _Call(part, ())
    once = jax.jit(functools.partial(_traced, program, call, settings))
    return once(contents.arrays, *operands)  # the compiled program is released with `once`


def call_now(function: Callable, *args):
    """Returns function(*args) with the current weights: a trace that `jax.jit` or the like cached may have older ones.

    Raises:
      UserError: `function` cannot be called.
    """
    check_function("the function", function)
    code = read([function])
    if code.complete or not code.transformed or _uses_current_arrays(function):
        return function(*args)
    with _TRACE_CONTEXT(object()):
        return function(*args)


def _uses_current_arrays(function: Callable) -> bool:
    """Returns whether a function reads only the arrays of its modules, and no wrapper caches traces over them."""
    contents = _Contents()
    _split(function, contents)
    return not contents.unwrapped and read(contents.code).complete


@functools.lru_cache(maxsize=64)  # more than there are programs
def _compiled(program: Callable) -> Callable:
    return jax.jit(functools.partial(_traced, program), static_argnums=(0, 1))


def _traced(program: Callable, call: "_Call", settings: tuple, arrays, *operands):
    with _TRACE_CONTEXT(object()):
        return program(call, *settings, arrays, *operands)


@dataclasses.dataclass
class _Contents:
    """The values that a callable contains.

    Attributes:
      arrays: arguments of its program.
      code: classes, functions and constants on which its program depends.
      unwrapped: a wrapper that caches results or traces was removed.
    """

    arrays: list = dataclasses.field(default_factory=list)
    code: list = dataclasses.field(default_factory=list)
    unwrapped: bool = False


@dataclasses.dataclass(frozen=True)
class _Call:
    """The hashable rest of a callable: call(arrays, *args) evaluates the callable with these arrays."""

    part: Any
    facts: tuple  # of CodeFacts

    def __call__(self, arrays, *args):
        return self.part.build(arrays)(*args)


# The hashable rest is a tree of the following nodes, which build a value from arrays.


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any

    def build(self, arrays):
        return self.value


@dataclasses.dataclass(frozen=True)
class _Array:
    index: int

    def build(self, arrays):
        return arrays[self.index]


@dataclasses.dataclass(frozen=True)
class _Composite:
    make: Callable
    parts: tuple

    def build(self, arrays):
        return self.make(*(part.build(arrays) for part in self.parts))


@dataclasses.dataclass(frozen=True)
class _Module:
    graph: Any
    index: int
    attributes: tuple  # ((path, part), ...) of attributes that are not part of the module's state

    def build(self, arrays):
        module = nnx.merge(self.graph, arrays[self.index], copy=True)  # a copy, as a call may set its variables
        for path, part in self.attributes:
            if isinstance(part, _Composite | _Module):
                _set_entry(module, path, part.build(arrays))
        return module


def _set_entry(module, path: tuple, value) -> None:
    *nodes, name = path
    for key in nodes:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    setattr(module, name, value)


def _split(value: Any, contents: _Contents):
    """Returns the hashable rest of a value and adds its arrays and code to `contents`."""
    if _is_array(value):
        contents.arrays.append(value)
        return _Array(len(contents.arrays) - 1)
    if _is_cached(value):
        contents.unwrapped = contents.unwrapped or not read([value]).complete
        return _split(value.__wrapped__, contents)
    if type(value) in (tuple, list):
        return _Composite(_sequence, (_Constant(type(value)), *(_split(item, contents) for item in value)))
    if type(value) is dict:
        return _Composite(_mapping, tuple(_split(items, contents) for items in (tuple(value), tuple(value.values()))))
    part = None
    if isinstance(value, nnx.Pytree | nnx.Variable):
        part = _module(value, contents)
    elif type(value) in (functools.partial, jax.tree_util.Partial):
        part = _partial(value, contents)
    elif isinstance(value, types.MethodType):
        part = _method(value, contents)
    elif fields := frozen_fields(value):
        part = _dataclass(value, fields, contents)
    if part is None:
        contents.code.append(value)
        return _Constant(value)
    return part


def _is_array(value) -> bool:
    return isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufcV")


def _is_cached(value) -> bool:
    """Returns whether `jax.jit` or `functools.cache` wraps a user's function, and may cache results of older arrays."""
    compiled = is_transformed(value) and hasattr(value, "lower")
    return (compiled or isinstance(value, _CACHED_FUNCTION)) and not is_of_library(value)


def _sequence(kind, *items):
    return kind(items)


def _mapping(keys, values):
    return dict(zip(keys, values, strict=True))


def _module(module, contents: _Contents) -> _Module | None:
    """Splits a module into its graph, its state, and its other attributes; None if that cannot be done."""
    try:
        graph, state = nnx.split(module)
        hash(graph)
    except (TypeError, ValueError):
        return None
    index, attributes = len(contents.arrays), []
    contents.arrays.append(state)
    for path, value in nnx.iter_graph(module):
        if isinstance(value, nnx.Pytree | nnx.Variable):
            contents.code.append(type(value))
        if isinstance(value, nnx.Variable):  # its metadata may hold hooks, called when it is read or set
            contents.code += filter(callable, value.get_metadata().values())
        inside = isinstance(value, (nnx.Pytree, nnx.Variable, jax.Array, np.ndarray, tuple, list, dict))
        if path and not inside and not str(path[-1]).startswith("_pytree__"):
            part = _split(value, contents)
            attributes.append((path, part))
            if isinstance(part, _Composite | _Module) and not isinstance(path[-1], str):
                return None  # an entry of a container
    if replaced := [path for path, part in attributes if isinstance(part, _Composite | _Module)]:
        module = nnx.merge(graph, state, copy=True)
        for path in replaced:  # `_Module.build` sets them
            _set_entry(module, path, None)
        graph, contents.arrays[index] = nnx.split(module)
    return _Module(graph, index, tuple(attributes))


def _partial(value: functools.partial, contents: _Contents) -> _Composite:
    args, keywords = value.args, value.keywords
    if isinstance(value, jax.tree_util.Partial):  # a pytree, whose numbers are leaves
        args, keywords = jax.tree.map(_number_as_array, (args, keywords), is_leaf=lambda x: isinstance(x, nnx.Pytree))
    return _Composite(_bind, tuple(_split(part, contents) for part in (value.func, args, keywords)))


def _number_as_array(value):
    return np.asarray(value) if isinstance(value, float | complex) else value


def _bind(function, args, keywords):
    return functools.partial(function, *args, **keywords)


def _method(value: types.MethodType, contents: _Contents) -> _Composite | None:
    """Splits a bound method into function and object; None if the object's classes do not define the function."""
    owner, function = value.__self__, value.__func__
    name = getattr(function, "__name__", "")
    if not any(vars(kind).get(name) is function for kind in type(owner).__mro__):
        return None
    return _Composite(types.MethodType, (_split(function, contents), _split(owner, contents)))


def _dataclass(value, names: tuple[str, ...], contents: _Contents) -> _Composite:
    """Splits a frozen dataclass into its fields; cached properties are computed again."""
    contents.code.append(type(value))
    fields = (_split(getattr(value, name), contents) for name in names)
    return _Composite(_with_fields, (_Constant(type(value)), _Constant(names), *fields))


def _with_fields(kind, names, *values):
    """Makes a dataclass without calling __init__, whose checks would refuse tracers."""
    instance = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance
