"""Trees as checkpoints hold them: flat dicts by path, compared before anything is read, and how leaves are restored."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by path: `(ScaleByAdamState(mu={"a/b": x}),)` becomes `{"0/mu/a/b": x}`, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the optimizer state have the same path")
    return flat


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flatten` for a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in flatten(like)])


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], item: str) -> list[str]:
    """One phrase for each path whose presence, shape or dtype differs."""

    def describe(leaf):
        return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    described = [(path, describe(saved.get(path)), describe(wanted.get(path))) for path in sorted(saved | wanted)]
    return [f"{item}: {path} is {old} there and {new} here" for path, old, new in described if old != new]


def restore_args(leaf: Any) -> ocp.RestoreArgs:
    """Onto the leaf's sharding; to numpy where it has none, which no device count can upset."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
