"""Diff pruning (Guo et al. 2021, https://arxiv.org/abs/2012.07463): a difference to each kernel, in few entries.

W + z * d, entry by entry. The gate z is drawn from a hard concrete distribution (Louizos et al. 2018) in training,

  s = sigmoid((log u - log(1 - u) + log_alpha) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),

so that P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)) has a gradient; the sum of these over all entries, the
expected number of entries that change, is the penalty. Without training u is left out. What is kept of a run is sparse.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.projection import Projection, contract, projections
from train_jax.core import patterns
from train_jax.core.errors import UserError

TRAINABLE = r".*/kernel/(difference|log_alpha)"
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of Louizos et al. 2018
_OPEN = 2.0  # log_alpha at the start: gates are open nine times in ten


class DiffKernel(nnx.Module):
    """Takes the place of a projection's kernel: `base`, `difference` and `log_alpha`, all of its shape."""

    def __init__(self, base: Array, name: str, num_in: int):
        self.name, self.num_in = name, num_in
        self.base = nnx.Param(base)
        self.difference = nnx.Param(jnp.zeros(base.shape))
        self.log_alpha = nnx.Param(jnp.full(base.shape, _OPEN))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain kernel."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Of the plain kernel."""
        return self.base.size

    @property
    def dtype(self) -> jnp.dtype:
        """Of the plain kernel."""
        return self.base.dtype

    def contract(self, x: Array, keys: Key[Array, " B"] | None) -> Array:
        """x (W + z d) in float32; with keys (training) z is drawn by the first, one for all parts of a batch."""
        u = None
        if keys is not None:
            key = fold_in_name(keys[:1], self.name)[0]
            u = jax.random.uniform(key, self.shape, jnp.float32, 1e-6, 1.0 - 1e-6)
        kernel = self.base[...].astype(jnp.float32) + self._gated(u)
        return contract(x, kernel.astype(x.dtype), self.num_in)

    def dequantize(self) -> Array:
        """W + z d in float32, without noise."""
        return self.base[...].astype(jnp.float32) + self.delta()

    def delta(self) -> Array:
        """z d without noise: zero where the gate is shut."""
        return self._gated(None)

    def _gated(self, u: Array | None) -> Array:
        log_alpha = self.log_alpha[...]
        noise = 0.0 if u is None else jnp.log(u) - jnp.log1p(-u)
        gate = jax.nn.sigmoid((noise + log_alpha) / (1.0 if u is None else BETA))
        return jnp.clip(gate * (ZETA - GAMMA) + GAMMA, 0.0, 1.0) * self.difference[...]

    def expected_nonzero(self) -> Float[Array, ""]:
        """Sum of P(z > 0)."""
        return jax.nn.sigmoid(self.log_alpha[...] - BETA * math.log(-GAMMA / ZETA)).sum()


def attach_diff(model: nnx.Module, targets: str = r"decoder/.*_proj") -> nnx.Module:
    """Gives the projections that match a difference of zero, in place.

    Raises:
      UserError: the pattern matches nothing, or a kernel that is quantised or has a difference already.
    """
    modules = projections(model)
    for path in patterns.select(targets, modules, what="diff targets"):
        module = modules[path]
        if not isinstance(module.kernel, nnx.Variable):
            raise UserError(
                f"{path} has no plain kernel, expected one to learn a difference to: load the base as it is."
            )
        module.kernel = DiffKernel(module.kernel[...], module.name, len(module.in_shape))
    return model


def kernels(model: nnx.Module) -> dict[str, Projection]:
    """The projections that have a difference, by path."""
    return {path: module for path, module in projections(model).items() if isinstance(module.kernel, DiffKernel)}


def expected_share(model: nnx.Module) -> Float[Array, ""]:
    """Share of the entries that are expected to change, 0 to 1: the penalty."""
    found = [module.kernel for module in kernels(model).values()]
    return sum(kernel.expected_nonzero() for kernel in found) / sum(kernel.size for kernel in found)


def merge_diff(model: nnx.Module) -> nnx.Module:
    """Adds the differences to the kernels, in place, in float32 and cast once: a plain model again.

    Raises:
      UserError: the model has none.
    """
    found = kernels(model)
    if not found:
        raise UserError("the model has no differences to merge: load a run of diff pruning.")
    for module in found.values():
        module.kernel = nnx.Param(module.kernel.dequantize().astype(module.kernel.dtype))
    return model


def detach_diff(model: nnx.Module) -> nnx.Module:
    """Removes the differences, in place: the base again."""
    for module in kernels(model).values():
        module.kernel = nnx.Param(module.kernel.base[...])
    return model


def sparse_delta(model: nnx.Module) -> dict[str, np.ndarray]:
    """What diff pruning is for: of each kernel the flat positions (int32) and values (float32) that change.

    Returns:
      {"PATH/positions": [n], "PATH/values": [n]}, PATH being the kernel's in the plain model.
    """
    out = {}
    for path, module in kernels(model).items():
        delta = np.asarray(module.kernel.delta()).ravel()
        positions = np.flatnonzero(delta)
        out[f"{path}/kernel/positions"] = positions.astype(np.int32 if delta.size < 2**31 else np.int64)
        out[f"{path}/kernel/values"] = delta[positions]
    return out


def save_sparse(model: nnx.Module, file: str | Path) -> None:
    """Writes `sparse_delta` as an .npz."""
    np.savez_compressed(file, **sparse_delta(model))


def add_sparse(model: nnx.Module, file: str | Path) -> nnx.Module:
    """Adds a saved difference to a plain base, in place.

    Raises:
      UserError: the file is of another model, or no such file.
    """
    modules = projections(model)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            saved = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no saved difference ({error}), expected an .npz of save_sparse.") from None
    for name in [name for name in saved if name.endswith("/kernel/positions")]:
        path = name.removesuffix("/kernel/positions")
        positions, values = saved[name], saved.get(f"{path}/kernel/values")
        kernel = modules[path].kernel if path in modules else None
        fits = isinstance(kernel, nnx.Variable) and values is not None and values.shape == positions.shape
        if not fits or (positions.size and not 0 <= positions.min() <= positions.max() < kernel.size):
            raise UserError(f"{file} changes {path}, which this model has not in that size: load it on its own base.")
        flat = kernel[...].astype(jnp.float32).ravel().at[positions].add(values)
        kernel[...] = flat.reshape(kernel.shape).astype(kernel.dtype)
    return model
