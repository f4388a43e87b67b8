"""How a model lies on a mesh while it runs: rows stay on their devices, and weights come to the rows.

A batch is split by rows over the axes "data" and "fsdp", and "fsdp" splits parameters as well. From that alone the
compiler may compute partial products of every row on every device and sum them, which multiplies the compute by the
number of devices and exchanges activations. So a model pins its activations to rows at the edges of its blocks, and
gathers a block's weights where it uses them: fully sharded data parallelism (Rajbhandari et al. 2020, stage 3,
https://arxiv.org/abs/1910.02054; Xu et al. 2021, https://arxiv.org/abs/2105.04663).

A model names the axis of its rows and no more. The mesh is that of the context in which a program is traced (`over`);
without one, and for arrays outside of `jax.jit`, every function here returns what it is given.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

ROW_AXES = ("data", "fsdp")
_WEIGHTS = "fsdp"  # the axis that `gather` undoes
_PRODUCTS = ("dot_general", "conv_general_dilated", "pallas_call")  # not cheap to compute again
_METADATA = "gathered_spec"  # of a Variable that "fsdp" splits: its spec without it

T = TypeVar("T")


def over(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The context in which programs are traced for a mesh with the axes ROW_AXES.

    Nothing is moved: arrays that programs are given within it, a model's first of all, must lie on this mesh.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def within(mesh: Mesh, function: Callable) -> Callable:
    """`function` for `jax.jit`, traced for a mesh."""

    @functools.wraps(function)
    def traced(*arguments, **options):
        with over(mesh):
            return function(*arguments, **options)

    return traced


def row_parts(rows: int) -> int:
    """Into how many parts the context's mesh splits so many rows: 1 without a mesh, or if it does not divide them."""
    mesh = _mesh()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)
    return parts if rows % parts == 0 else 1


def pin_rows(tree: T, axes: Any = 0) -> T:
    """The arrays of a tree, split over ROW_AXES by rows and not split otherwise.

    Args:
      tree: arrays of any rank; one whose rows the mesh does not divide stays as it is.
      axes: where the rows are, one number for all arrays or a prefix of the tree with one for each part.
    """

    def pin(axis: int, x: jax.Array) -> jax.Array:
        if row_parts(x.shape[axis]) == 1 or not isinstance(x, jax.core.Tracer):
            return x
        return lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, ROW_AXES))

    return jax.tree.map(lambda axis, part: jax.tree.map(lambda x: pin(axis, x), part), axes, tree)


def by_rows(function: Callable, rows: Any, out_rows: Any) -> Callable:
    """`function` of arrays, called by every device with its own rows: a loss or a choice that needs no others.

    Args:
      function: of arrays or trees of them; it returns arrays of as many rows, and sums over rows.
      rows: which of its arguments have rows, on axis 0: True or False, a prefix of the arguments; the others come whole
        (they are gathered, once).
      out_rows: the same of its results; what has no rows is summed over devices.

    Returns:
      A function of the whole arrays. Not meant to be differentiated.
    """

    def summed(*arguments):
        total = lambda has_rows, part: part if has_rows else lax.psum(part, ROW_AXES)  # noqa: E731
        return jax.tree.map(total, out_rows, function(*arguments))

    def mapped(*arguments):
        lengths = lambda has_rows, part: [len(x) for x in jax.tree.leaves(part)] if has_rows else []  # noqa: E731
        if 1 in map(row_parts, jax.tree.leaves(jax.tree.map(lengths, rows, arguments))):
            return function(*arguments)
        places = functools.partial(jax.tree.map, lambda has_rows: PartitionSpec(*[ROW_AXES] * has_rows))
        options = dict(axis_names=set(ROW_AXES), check_vma=False)  # nothing is differentiated through it
        return jax.shard_map(summed, in_specs=places(rows), out_specs=places(out_rows), **options)(*arguments)

    return mapped


def mark(model: nnx.Module, places: Mapping[str, NamedSharding]) -> nnx.Module:
    """Notes at every Variable that "fsdp" splits how it lies when gathered; returns the model, changed in place.

    Args:
      model: its arrays may be shapes.
      places: shardings by "/"-joined path.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = places["/".join(map(str, path))].spec
        parts = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
        if any(_WEIGHTS in part for part in parts):
            variable.set_metadata(_METADATA, tuple(tuple(a for a in part if a != _WEIGHTS) or None for part in parts))
    return model


def gather(module: T) -> T:
    """A copy of a module, or of a state of one, whose arrays "fsdp" no longer splits; other axes still do.

    Of a stack of layers one layer may be given. Differentiated, this belongs within `apply_block` or
    `recompute_gathered`: else they are kept whole for the backward pass.
    """
    if not gathers():
        return module
    return jax.tree.map(lambda leaf: leaf.replace(gathered(leaf)), module, is_leaf=_is_variable)


def gathered(variable: nnx.Variable) -> jax.Array:
    """The array of one Variable, gathered."""
    value, spec = variable.get_value(), variable.get_metadata().get(_METADATA)
    if spec is None or not gathers() or not isinstance(value, jax.core.Tracer):
        return value
    return lax.with_sharding_constraint(value, PartitionSpec(*spec[len(spec) - value.ndim :]))


def gathers() -> bool:
    """Whether the context's mesh splits parameters by rows."""
    mesh = _mesh()
    return mesh is not None and mesh.shape[_WEIGHTS] > 1


def recompute_gathered(function: Callable, state: nnx.State, *, stacked: bool) -> Callable:
    """`function`, whose backward pass gathers weights again instead of keeping them; all else is kept.

    Args:
      function: it gathers the weights that it uses.
      state, stacked: see `without_weights`.
    """
    if not gathers() or not _weight_sizes(state, stacked):
        return function
    policy = without_weights(jax.checkpoint_policies.everything_saveable, state, stacked=stacked)
    # The compiler cannot merge the two passes of a scan.
    return jax.checkpoint(function, policy=policy, prevent_cse=not stacked)


def without_weights(policy: Callable, state: nnx.State, *, stacked: bool) -> Callable:
    """A policy of `jax.checkpoint` that keeps what `policy` keeps, but nothing of the size of a gathered weight.

    That is weights, and what adapters and codecs make of them: a sum W + z d, a product A B, a cast. What rows make is
    kept, but for cheap results that happen to have such a size: policies see sizes, not where arrays come from.

    Args:
      policy: of `jax.checkpoint`.
      state: of the module, before it is gathered.
      stacked: whether arrays have a leading axis of layers, of which the function is given one in a scan.
    """
    sizes = _weight_sizes(state, stacked) if gathers() else set()

    def may_be_kept(primitive, *operands, **parameters):
        if not policy(primitive, *operands, **parameters):
            return False
        if primitive.name in _PRODUCTS or "call_jaxpr" in parameters:
            return not _is_low_rank_update(primitive, operands, parameters, sizes)
        return sizes.isdisjoint(x.size for x in _results(primitive, operands, parameters))

    return may_be_kept if sizes else policy


def _weight_sizes(state: nnx.State, stacked: bool) -> set[int]:
    """Of one layer's weights that "fsdp" splits; bytes may be two codes each, of as many weights."""
    variables = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_variable) if _METADATA in leaf.get_metadata()]
    whole = {(math.prod(leaf.shape[stacked:]), leaf.dtype == "uint8") for leaf in variables}
    return {size for size, _ in whole} | {2 * size for size, packed in whole if packed}


def _is_low_rank_update(primitive: Any, operands: tuple, parameters: dict[str, Any], sizes: set[int]) -> bool:
    """Whether this is a product A B of a weight's size with more entries than either factor, which few of rows are."""
    if primitive.name != "dot_general" or any(parameters["dimension_numbers"][1]):
        return False
    (result,) = _results(primitive, operands, parameters)
    return result.size in sizes and result.size > max(x.size for x in operands)


def _results(primitive: Any, operands: tuple, parameters: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """What an operation returns."""
    return jax.tree.leaves(jax.eval_shape(functools.partial(primitive.bind, **parameters), *operands))


def apply_block(block: nnx.Module, *inputs: Any, call: Callable | None = None, remat: bool = False) -> Any:
    """`block(*inputs)` of a block that stands alone, in no stack: weights gathered, its output pinned to rows.

    Args:
      block: its parameters are not changed by the call.
      inputs: arrays with rows on axis 0, or None.
      call: what is computed instead, of the gathered block and the inputs.
      remat: recompute all of it in the backward pass; else weights alone are gathered again.
    """
    graph, state = nnx.split(block)

    def run(state, *inputs):
        gathered = nnx.merge(graph, gather(state))
        return pin_rows(gathered(*inputs) if call is None else call(gathered, *inputs))

    run = jax.checkpoint(run) if remat else recompute_gathered(run, state, stacked=False)
    return run(state, *inputs)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _mesh() -> AbstractMesh | None:
    """The mesh of the context, if it splits rows and no `shard_map` has done so."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(axis not in mesh.shape for axis in ROW_AXES):
        return None
    automatic = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if all(automatic[axis] == AxisType.Auto for axis in ROW_AXES) else None
