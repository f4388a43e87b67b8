"""A cache of this process: what the runs of one process share, such as the base of a run and of its control run.

`PROCESS_CACHE` is the only one that tasks keep, and it is bounded: one value of each kind, the one made last.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from flax import nnx

from train_jax.core import param_tree

Value = TypeVar("Value")
Model = TypeVar("Model", bound=nnx.Module)


class LatestCache:
    """Keeps the latest value of each kind, with its key."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Hashable, Callable[[], Any]]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """Returns the value of a key: the cached one if it has that key, else `make()`, which replaces it."""
        return self._get(kind, key, make, lambda value: lambda: value)

    def model(self, key: Hashable, read: Callable[[], Model]) -> Model:
        """Returns the model of a key: a new module over the arrays of the model read last, else `read()`.

        The cache does not keep the arrays alive. The caller freezes them: a frozen array is never written and never
        donated, so any number of modules may share it. Adapters may be attached to the module returned.
        """
        return self._get("model", key, read, _weakly)

    def _get(
        self, kind: str, key: Hashable, make: Callable[[], Value], hold: Callable[[Value], Callable[[], Value | None]]
    ) -> Value:
        """Returns the value of a key.

        `hold` turns a value into a function that returns it again, or None once it is gone.
        """
        cached_key, restore = self._latest.get(kind, (None, lambda: None))
        value = restore() if cached_key == key else None
        if value is None:
            self._latest.pop(kind, None)
            value = make()
            self._latest[kind] = key, hold(value)
        return value


def _weakly(model: Model) -> Callable[[], Model | None]:
    """Returns a function that builds a module over the same arrays, or returns None once one is gone."""
    graph, arrays = param_tree.split(model)
    references = {path: weakref.ref(array) for path, array in arrays.items()}

    def restore() -> Any:
        alive: dict[str, Any] = {path: reference() for path, reference in references.items()}
        if any(array is None or array.is_deleted() for array in alive.values()):
            return None
        return param_tree.merge(graph, alive)

    return restore


PROCESS_CACHE = LatestCache()
