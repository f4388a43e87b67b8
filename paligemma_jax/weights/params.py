"""A model's parameters as a flat dictionary of "/"-joined paths, and back."""

import jax
from flax import nnx


def flatten(model: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter of a model by path, such as "decoder/layers/self_attn/q_proj/kernel"."""
    return {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of a model, abstract (`nnx.eval_shape`) or not."""
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def assign(model: nnx.Module, params: dict[str, jax.Array]) -> nnx.Module:
    """Puts arrays into a model (in place), by path; paths that `params` lacks keep what they hold.

    Raises:
      KeyError: a path the model does not have.
      ValueError: an array of another shape.
    """
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path, array in params.items():
        if leaves[path].shape != array.shape:
            raise ValueError(f"{path} has shape {leaves[path].shape}, got an array of shape {array.shape}.")
    state = nnx.from_flat_state([(tuple(path.split("/")), nnx.Param(array)) for path, array in params.items()])
    nnx.update(model, state)
    return model
