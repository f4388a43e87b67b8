"""Sharding constraints of a model on a mesh: activations stay on the devices of their rows, weights are gathered.

A batch is split by rows over the axes "data" and "fsdp", and "fsdp" also splits parameters. From these shardings alone,
the compiler may compute partial products of every row on every device and sum them, which multiplies the compute by the
number of devices and exchanges activations. Models therefore pin their activations to rows at the boundaries of blocks,
and gather the weights of a block where they are used: fully sharded data parallelism (Rajbhandari et al. 2020, stage 3,
https://arxiv.org/abs/1910.02054; Xu et al. 2021, https://arxiv.org/abs/2105.04663).

A model only names the axis of its rows. The mesh is that of the context in which a program is traced (`use_mesh`).
Without one, and for arrays outside `jax.jit`, every function here returns its argument.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

ROW_AXES = ("data", "fsdp")
_WEIGHTS = "fsdp"  # the axis over which `gather` gathers
_PRODUCTS = ("dot_general", "conv_general_dilated", "pallas_call")  # expensive to recompute
_NAMED = "name"  # of jax.ad_checkpoint.checkpoint_name, which the models use for activations
_METADATA = "gathered_spec"  # metadata of a Variable that "fsdp" splits: its spec without "fsdp"

T = TypeVar("T")
M = TypeVar("M", bound=nnx.Module)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Returns the context in which programs are traced for a mesh with the axes ROW_AXES.

    It moves no arrays: the arguments of programs, in particular models, must be on this mesh.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
    """Returns `function` for `jax.jit`, traced for a mesh."""

    @functools.wraps(function)
    def traced(*arguments, **options):
        with use_mesh(mesh):
            return function(*arguments, **options)

    return traced


def row_parts(rows: int) -> int:
    """Returns the number of parts into which the context's mesh splits rows; 1 without a mesh or an even split."""
    parts = row_devices()
    return parts if rows % parts == 0 else 1


def row_devices() -> int:
    """Returns the number of devices along ROW_AXES of the context's mesh; 1 without one."""
    mesh = _mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)


def pin_rows(tree: T, axes: Any = 0) -> T:
    """Constrains the arrays of a tree to be split over ROW_AXES by rows only.

    Args:
      tree: arrays of any rank; one whose rows the mesh does not divide is not constrained.
      axes: axis of the rows, for all arrays or as a prefix of the tree.
    """

    def pin(axis: int, x: jax.Array) -> jax.Array:
        if row_parts(x.shape[axis]) == 1 or not isinstance(x, Tracer):
            return x
        return lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, ROW_AXES))

    return jax.tree.map(lambda axis, part: jax.tree.map(lambda x: pin(axis, x), part), axes, tree)


def by_rows(function: Callable, rows: Any, out_rows: Any) -> Callable:
    """Maps `function` over devices, each with its own rows; for losses and samplers that are independent across rows.

    Args:
      function: of arrays or trees; returns arrays with the same rows, or sums over rows.
      rows: whether each argument has rows on axis 0, as a prefix of the arguments; others are gathered.
      out_rows: the same for results; results without rows are summed over devices. Sums of matrices, as the gradients
        of weights, are split by columns over "fsdp" where it splits weights.

    Returns:
      A function of the whole arrays. It cannot be differentiated.
    """

    def mapped(*arguments):
        lengths = lambda has_rows, part: [len(x) for x in jax.tree.leaves(part)] if has_rows else []  # noqa: E731
        if 1 in map(row_parts, jax.tree.leaves(jax.tree.map(lengths, rows, arguments))):
            return function(*arguments)
        spec = lambda has_rows: PartitionSpec(*[ROW_AXES] * has_rows)  # noqa: E731
        out_specs = jax.tree.map(spec, out_rows)
        if gathers():
            sums = functools.partial(jax.tree.map, _spec_of_sum)
            place = lambda has_rows, part: spec(True) if has_rows else sums(part)  # noqa: E731
            out_specs = jax.tree.map(place, out_rows, jax.eval_shape(function, *arguments))

        def summed(*arguments):
            return jax.tree.map(_sum, out_specs, function(*arguments))

        return jax.shard_map(
            summed,
            in_specs=jax.tree.map(spec, rows),
            out_specs=out_specs,
            axis_names=set(ROW_AXES),
            check_vma=False,  # needed for derivatives only
        )(*arguments)

    return mapped


def _spec_of_sum(x: jax.ShapeDtypeStruct) -> PartitionSpec:
    """Returns how a sum over devices is split where "fsdp" splits weights: a matrix by its columns, if they divide."""
    mesh = _mesh()
    assert mesh is not None
    divisible = x.ndim > 1 and x.shape[-1] % mesh.shape[_WEIGHTS] == 0
    return PartitionSpec(*[None] * (x.ndim - 1), _WEIGHTS) if divisible else PartitionSpec()


def _sum(spec: PartitionSpec, tree: Any) -> Any:
    """Returns the arrays of a spec of `by_rows` summed over the devices, unless they have rows of their own."""

    def of_array(x: jax.Array) -> jax.Array:
        if spec == PartitionSpec():
            return lax.psum(x, ROW_AXES)
        x = lax.psum_scatter(x, _WEIGHTS, scatter_dimension=x.ndim - 1, tiled=True)
        return lax.psum(x, tuple(axis for axis in ROW_AXES if axis != _WEIGHTS))

    return tree if spec == PartitionSpec(ROW_AXES) else jax.tree.map(of_array, tree)


def mark(model: nnx.Module, shardings: Mapping[str, NamedSharding]) -> nnx.Module:
    """Stores in every Variable that "fsdp" splits its gathered sharding; changes the model in place and returns it.

    Args:
      model: with arrays or shapes.
      shardings: by "/"-joined path.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = shardings["/".join(map(str, path))].spec
        parts = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
        if any(_WEIGHTS in part for part in parts):
            variable.set_metadata(_METADATA, tuple(tuple(a for a in part if a != _WEIGHTS) or None for part in parts))
    return model


def gather(module: T) -> T:
    """Returns a copy of a module or state with arrays gathered over "fsdp"; other axes still split them.

    The argument may be one layer of a stack. To differentiate through it, use it within `apply_block` or
    `recompute_gathered`; otherwise the gathered arrays are saved for the backward pass.
    """
    if not gathers():
        return module
    return jax.tree.map(lambda leaf: leaf.replace(gathered(leaf)), module, is_leaf=_is_variable)


def gather_once(module: M) -> M:
    """Returns a copy as `gather` does, for the rest of the program: nothing gathers its arrays again."""
    if not gathers():
        return module
    copy = gather(module)
    for _, variable in nnx.to_flat_state(nnx.state(copy)):
        variable.set_metadata(_METADATA, None)
    return copy


def gathered(variable: nnx.Variable) -> jax.Array:
    """Returns the array of one Variable, gathered."""
    value, spec = variable.get_value(), variable.get_metadata().get(_METADATA)
    if spec is None or not gathers() or not isinstance(value, Tracer):
        return value
    return lax.with_sharding_constraint(value, PartitionSpec(*spec[len(spec) - value.ndim :]))


def look_up(table: nnx.Variable, index: jax.Array) -> jax.Array:
    """Returns rows of a table [V, D] for an index [B, T], pinned to the rows of the index.

    Every device looks up the columns that it has, of a table that "fsdp" splits, for the rows of all devices of that
    axis, and exchanges them for its own rows: less than the table, which is not gathered, and neither is its gradient.
    The table is gathered if it has fewer rows than the index has entries on a device.
    """
    value, (rows, length) = table.get_value(), index.shape
    split = table.get_metadata().get(_METADATA) is not None and gathers() and isinstance(index, Tracer)
    parts = row_parts(rows)
    if not split or parts == 1 or rows // parts * length > value.shape[0]:
        return pin_rows(jnp.take(gathered(table), index, axis=0))
    others = tuple(axis for axis in ROW_AXES if axis != _WEIGHTS)
    index = lax.with_sharding_constraint(index, PartitionSpec(others))
    columns = PartitionSpec(others, None, _WEIGHTS)
    return pin_rows(lax.with_sharding_constraint(jnp.take(value, index, axis=0), columns))


def gathers() -> bool:
    """Returns whether the context's mesh splits parameters over "fsdp"."""
    mesh = _mesh()
    return mesh is not None and mesh.shape[_WEIGHTS] > 1


def recompute_gathered(function: Callable, state: nnx.State, *, stacked: bool) -> Callable:
    """Returns `function` with a backward pass that gathers weights again; all other intermediates are saved.

    Args:
      function: a function that gathers its weights.
      state: see `without_weights`.
      stacked: see `without_weights`.
    """
    if not gathers() or not _weight_sizes(state, stacked):
        return function
    policy = without_weights(jax.checkpoint_policies.everything_saveable, state, stacked=stacked)
    # The compiler cannot merge the two passes of a scan.
    return jax.checkpoint(function, policy=policy, prevent_cse=not stacked)


def without_weights(policy: Callable, state: nnx.State, *, stacked: bool) -> Callable:
    """Returns a `jax.checkpoint` policy that saves what `policy` saves, except arrays of the size of a gathered weight.

    These are weights, and arrays that adapters and codecs compute from them: a sum W + z d, a product A B, a cast.
    Activations are saved, except for cheap results that have such a size by chance: a policy sees sizes, not origins.

    Args:
      policy: of `jax.checkpoint`.
      state: of the module, before gathering.
      stacked: whether arrays have a leading axis of layers, which a scan passes to the function one at a time.
    """
    sizes = _weight_sizes(state, stacked) if gathers() else set()

    def saveable(primitive, *operands, **parameters):
        if not policy(primitive, *operands, **parameters):
            return False
        if primitive.name in (*_PRODUCTS, _NAMED) or "call_jaxpr" in parameters:
            return not _is_low_rank_update(primitive, operands, parameters, sizes)
        return sizes.isdisjoint(x.size for x in _results(primitive, operands, parameters))

    return saveable if sizes else policy


def _weight_sizes(state: nnx.State, stacked: bool) -> set[int]:
    """Returns the sizes of one layer's weights that "fsdp" splits; a uint8 array may hold two 4-bit codes in a byte."""
    variables = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_variable) if _METADATA in leaf.get_metadata()]
    sizes = {(math.prod(leaf.shape[stacked:]), leaf.dtype == "uint8") for leaf in variables}
    return {size for size, _ in sizes} | {2 * size for size, packed in sizes if packed}


def _is_low_rank_update(primitive: Any, operands: tuple, parameters: dict[str, Any], sizes: set[int]) -> bool:
    """Returns whether an operation is a product A B of a weight's size, larger than A and B, as few activations are."""
    if primitive.name != "dot_general" or any(parameters["dimension_numbers"][1]):
        return False
    (result,) = _results(primitive, operands, parameters)
    return result.size in sizes and result.size > max(x.size for x in operands)


def _results(primitive: Any, operands: tuple, parameters: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of an operation's results."""
    return jax.tree.leaves(jax.eval_shape(functools.partial(primitive.bind, **parameters), *operands))


def apply_block(block: nnx.Module, *inputs: Any, call: Callable | None = None, remat: bool = False) -> Any:
    """Applies a block that is not part of a stack: gathers its weights and pins its output to rows.

    Args:
      block: a module whose call does not change its parameters.
      *inputs: arrays with rows on axis 0, or None.
      call: function of the gathered block and the inputs; None calls the block.
      remat: recompute everything in the backward pass; otherwise only weights are gathered again.
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
    """Returns the mesh of the context if it splits rows and no enclosing `shard_map` does; None otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(axis not in mesh.shape for axis in ROW_AXES):
        return None
    automatic = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if all(automatic[axis] == AxisType.Auto for axis in ROW_AXES) else None
