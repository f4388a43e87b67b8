"""Diff pruning (Guo et al. 2021, https://arxiv.org/abs/2012.07463): a sparse difference to each kernel.

The kernel is W + z * d, elementwise. In training the gate z is sampled from a hard concrete distribution (Louizos et
al. 2018),

  s = sigmoid((log u - log(1 - u) + log_alpha) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),  u uniform,

so that P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)) has a gradient. The penalty is proportional to its sum
over all entries, the expected number of entries that change. Outside training z is sigmoid(log_alpha), stretched and
clipped in the same way. A run saves the difference in a sparse format.
"""

import dataclasses
import math
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.adapt.method import Arrays, Axes, Method, ProjectionSplit
from paligemma_jax.models.dropout import DropoutKeys, fold_in_name
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import Projection, contract, projections
from train_jax.core import patterns
from train_jax.core.errors import UserError

TRAINABLE = r".*/kernel/(difference|log_alpha)"
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of Louizos et al. 2018
_INITIAL_LOG_ALPHA = 2.0  # gates are open with a probability of about 0.9


class DiffKernel(nnx.Module):
    """Replaces a projection's kernel by `base`, `difference` and `log_alpha`, all of its shape."""

    def __init__(self, base: Array, name: str, num_in: int):
        self.name, self.num_in = name, num_in
        self.base = nnx.Param(base)
        self.difference = nnx.Param(jnp.zeros(base.shape))
        self.log_alpha = nnx.Param(jnp.full(base.shape, _INITIAL_LOG_ALPHA))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain kernel."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Size of the plain kernel."""
        return self.base.size

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the plain kernel."""
        return self.base.dtype

    def contract(self, x: Array, keys: DropoutKeys | None) -> Array:
        """Returns x (W + z d) in float32; with keys (training) z is sampled with the first key, once per batch."""
        u = None
        if keys is not None:
            key = fold_in_name(keys.ravel()[:1], self.name)[0]
            u = jax.random.uniform(key, self.shape, jnp.float32, 1e-6, 1.0 - 1e-6)
        kernel = self.base[...].astype(jnp.float32) + self._gated(u)
        return contract(x, kernel.astype(x.dtype), self.num_in)

    def dequantize(self) -> Array:
        """Returns W + z d in float32, without noise."""
        return self.base[...].astype(jnp.float32) + self.delta()

    def delta(self) -> Array:
        """Returns z d without noise; it is zero where the gate is closed."""
        return self._gated(None)

    def _gated(self, u: Array | None) -> Array:
        log_alpha = self.log_alpha[...]
        noise = 0.0 if u is None else jnp.log(u) - jnp.log1p(-u)
        gate = jax.nn.sigmoid((noise + log_alpha) / (1.0 if u is None else BETA))
        return jnp.clip(gate * (ZETA - GAMMA) + GAMMA, 0.0, 1.0) * self.difference[...]

    def expected_nonzero(self) -> Float[Array, ""]:
        """Returns the sum of P(z > 0)."""
        return jax.nn.sigmoid(self.log_alpha[...] - BETA * math.log(-GAMMA / ZETA)).sum()


def attach_diff(model: nnx.Module, targets: str = r"decoder/.*_proj") -> nnx.Module:
    """Adds a difference of zero to the projections that match, in place.

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


def diff_projections(model: nnx.Module) -> dict[str, Projection]:
    """Returns the projections that have a difference, by path."""
    return {path: module for path, module in projections(model).items() if isinstance(module.kernel, DiffKernel)}


def expected_share(model: nnx.Module) -> Float[Array, ""]:
    """Returns the expected share of entries that change, 0 to 1, which is the penalty."""
    kernels = [module.kernel for module in diff_projections(model).values()]
    nonzero = cast(Array, sum(kernel.expected_nonzero() for kernel in kernels))  # a cast, as an empty sum would be 0
    return nonzero / sum(kernel.size for kernel in kernels)


def merge_diff(model: nnx.Module) -> nnx.Module:
    """Adds the differences to the kernels, in place, in float32 and cast once; the kernels are plain again.

    Raises:
      UserError: the model has no differences.
    """
    adapted = diff_projections(model)
    if not adapted:
        raise UserError("the model has no differences to merge: load a run of diff pruning.")
    for module in adapted.values():
        module.kernel = nnx.Param(module.kernel.dequantize().astype(module.kernel.dtype))
    return model


def detach_diff(model: nnx.Module) -> nnx.Module:
    """Removes the differences, in place, which leaves the base."""
    for module in diff_projections(model).values():
        module.kernel = nnx.Param(module.kernel.base[...])
    return model


def sparse_delta(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the entries of each kernel that change: flat positions (int32 if they fit) and values (float32).

    Returns:
      {"PATH/positions": [n], "PATH/values": [n]}; PATH is the kernel's path in the plain model.
    """
    out = {}
    for path, module in diff_projections(model).items():
        delta = np.asarray(module.kernel.delta()).ravel()
        positions = np.flatnonzero(delta)
        out[f"{path}/kernel/positions"] = positions.astype(np.int32 if delta.size < 2**31 else np.int64)
        out[f"{path}/kernel/values"] = delta[positions]
    return out


def add_sparse(model: nnx.Module, arrays: Arrays, source: str = "the difference") -> nnx.Module:
    """Adds a sparse difference to a plain base, in place.

    Args:
      model: the base.
      arrays: see `sparse_delta`.
      source: where they come from, for messages.

    Raises:
      UserError: the difference belongs to another model.
    """
    modules = projections(model)
    for name in [name for name in arrays if name.endswith("/kernel/positions")]:
        path = name.removesuffix("/kernel/positions")
        positions, values = arrays[name], arrays.get(f"{path}/kernel/values")
        kernel = modules[path].kernel if path in modules else None
        if (
            not isinstance(kernel, nnx.Variable)
            or values is None
            or values.shape != positions.shape
            or (positions.size and not 0 <= positions.min() <= positions.max() < kernel.size)
        ):
            raise UserError(f"{source} changes {path}, which this model has not in that size: load it on its own base.")
        flat = kernel[...].astype(jnp.float32).ravel().at[positions].add(values)
        kernel[...] = flat.reshape(kernel.shape).astype(kernel.dtype)
    return model


@dataclasses.dataclass(frozen=True)
class DiffPruning(Method[PaliGemma]):
    """Diff pruning, by the protocol of all methods; `penalty` is the weight of the share of entries that change."""

    name: ClassVar[str] = "diff_pruning"
    modules: ClassVar = (DiffKernel,)
    noise_per_step: ClassVar[bool] = True

    targets: str = r"decoder/.*_proj"
    penalty: int | float = 0.0

    @property
    def trainable(self) -> str:
        """Pattern of the differences and gates."""
        return TRAINABLE

    @classmethod
    def sharding_rules(cls, split: ProjectionSplit) -> tuple[tuple[str, Axes], ...]:
        """Splits the arrays of `DiffKernel`, which have the kernel's shape, like the kernel."""
        return ((f"{split.pattern}/kernel/(base|difference|log_alpha)", split.kernel),)

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        return cast(PaliGemma, attach_diff(model, self.targets))  # the same model

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """As in Method."""
        return cast(PaliGemma, detach_diff(model))  # the same model

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """As in Method; see `merge_diff`."""
        return cast(PaliGemma, merge_diff(model))  # the same model

    def export(self, model: PaliGemma) -> dict[str, Any]:
        """Returns the entries that change, see `sparse_delta`."""
        return sparse_delta(model)

    def load(self, model: PaliGemma, arrays: Arrays, source: str = "the difference") -> PaliGemma:
        """Adds the difference to the base, which stays a plain model."""
        return cast(PaliGemma, add_sparse(model, arrays, source))  # the same model

    def loss_term(self, model: PaliGemma) -> jax.Array | float:
        """Returns the penalty."""
        return self.penalty * expected_share(model) if self.penalty else 0.0
