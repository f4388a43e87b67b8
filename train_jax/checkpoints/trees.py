"""Trees in checkpoints: flattening to paths, comparison with saved trees, and arguments to restore leaves."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path: `(ScaleByAdamState(mu={"a/b": x}),)` becomes `{"0/mu/a/b": x}`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the optimizer state have the same path")
    return flat


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """Inverts `flatten`, for a tree with the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in flatten(like)])


def differences(saved: Mapping[str, Any], abstract: Mapping[str, Any], item: str) -> list[str]:
    """Returns a phrase for each path that is missing in one of two flat trees, or whose shape or dtype differs."""

    def describe(leaf):
        return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    paths = sorted({*saved, *abstract})
    described = [(path, describe(saved.get(path)), describe(abstract.get(path))) for path in paths]
    return [f"{item}: {path} is {old} there and {new} here" for path, old, new in described if old != new]


def restore_args(leaf: Any) -> ocp.RestoreArgs:
    """Returns the arguments to restore a leaf with its sharding, or as a numpy array if it has none."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
