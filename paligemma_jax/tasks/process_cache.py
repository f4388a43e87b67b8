"""The base that several tasks of one process share (a run and its control run): its weights lie in memory once.

A frozen array is never written and never donated, so any number of models may hold it.
"""

import weakref
from collections.abc import Callable, Hashable

from flax import nnx

from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core import param_tree

# Of the base read last: its key, its structure, and its arrays for as long as some model holds them.
_latest: tuple[Hashable, nnx.GraphDef, dict[str, weakref.ref]] | None = None


def shared(key: Hashable, read: Callable[[], PaliGemma]) -> PaliGemma:
    """The base of a key: a new module over the arrays of the one read last, while these are alive, else `read()`.

    The caller freezes it. Adapters may be attached to the module: they are its own.
    """
    global _latest
    if _latest is not None and _latest[0] == key:
        arrays = {path: reference() for path, reference in _latest[2].items()}
        if not any(array is None or array.is_deleted() for array in arrays.values()):
            return param_tree.merge(_latest[1], arrays)
    model = read()
    graph, arrays = param_tree.split(model)
    _latest = key, graph, {path: weakref.ref(array) for path, array in arrays.items()}
    return model
