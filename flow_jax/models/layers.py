"""Pieces that the velocity models share: time features, label embeddings, dropout by rows, initial values.

Models are called (t, x, labels=None, dropout_keys=None): t is a scalar or one a row, t = 0 noise and t = 1 data;
labels are what the model is told of every row (`Condition`); dropout draws from one key a row, so that the noise of a
row does not depend on the batch it is in.
"""

import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from flow_jax.arrays import CheckedLabels, CheckedTime, as_time, check_args

MAX_PERIOD = 10_000
TIME_SCALE = 1000.0  # times in [0, 1] as the features' periods were made for: steps 0 to 1000 (Ho et al. 2020)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def batch_times(t: CheckedTime, x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """One time a row, in float32. Raises UserError for times that are neither one nor one a row."""
    return jnp.broadcast_to(as_time(t, x).astype(jnp.float32), x.shape[:1])


def time_features(t: Float[Array, " B"], width: int) -> Float[Array, "B {width}"]:
    """Cosines and sines of t at geometric frequencies (Vaswani et al. 2017), as DDPM's of 1000 t."""
    half = width // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) / half * jnp.arange(half))
    angles = TIME_SCALE * t[:, None] * frequencies[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return jnp.pad(features, ((0, 0), (0, width - 2 * half)))


def linear(
    features_in: int, features_out: int, *, zero: bool = False, dtype: str | None = None, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer; `zero` ones output zero until trained, which makes their branch the identity at first.

    `dtype` is that of the computation; None takes it from inputs and parameters.
    """
    init = dict(kernel_init=nnx.initializers.zeros_init()) if zero else {}
    return nnx.Linear(features_in, features_out, dtype=dtype, rngs=rngs, **init)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """A function of jax.nn by name. Raises ValueError for a name that is none."""
    found = selu if name == "selu" else getattr(jax.nn, name, None)
    if not callable(found):
        raise ValueError(f"the activation is {name!r}, expected a function of jax.nn, such as silu, gelu or selu.")
    return found


def selu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Self-normalising units (Klambauer et al. 2017) to within float rounding of 1.

    jax.nn.selu takes expm1 to be exact relative to x near 0, which costs a fifth of an evaluation of an MLP on a CPU.
    """
    negative = jnp.where(x > 0, 0, x)  # no overflow, in the gradient either
    return SELU_SCALE * jnp.where(x > 0, x, SELU_ALPHA * (jnp.exp(negative) - 1))


class Condition(nnx.Module):
    """Time, and what else the model is told of a row, as one vector a row.

    Labels are of one kind, and every kind has one that stands for none (losses.drop_labels):

      num_classes=10        int [B]       one of ten classes; 10 is none
      num_classes=(2, 8)    int [B, 2]    an attribute of two values and one of eight; (2, 8) is none
      vector_width=128      float [B, E]  vectors, embeddings of texts say; zeros are none
    """

    def __init__(
        self,
        width: int,
        num_classes: int | tuple[int, ...] = 0,
        time_width: int = 256,
        vector_width: int = 0,
        *,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.kind, self.time_width = _kind(num_classes, vector_width), time_width
        self.time_in = linear(time_width, width, dtype=dtype, rngs=rngs)
        self.time_out = linear(width, width, dtype=dtype, rngs=rngs)

        def embed(number: int) -> nnx.Embed:
            return nnx.Embed(number + 1, width, rngs=rngs, **({"dtype": dtype} if dtype else {}))

        self.label = embed(num_classes) if self.kind == "one label" else None
        self.labels = nnx.List([embed(number) for number in num_classes] if self.kind == "several labels" else [])
        # Without a bias: zeros add nothing.
        vector = dict(use_bias=False, dtype=dtype, rngs=rngs)
        self.vector = nnx.Linear(vector_width, width, **vector) if self.kind == "vectors" else None

    def __call__(self, t: Float[Array, " B"], labels: CheckedLabels | None) -> Float[Array, "B D"]:
        check_args((labels,), t)
        found = _kind_of(labels)
        if found != self.kind:
            raise ValueError(f"the model is told {self.kind} of every row but got {found}.")
        c = self.time_out(jax.nn.silu(self.time_in(time_features(t, self.time_width))))
        if labels is None:
            return c
        if self.kind == "several labels":
            return c + sum(table(labels[:, place]) for place, table in enumerate(self.labels))
        return c + (self.label if self.kind == "one label" else self.vector)(labels)


def _kind(num_classes: int | tuple[int, ...], vector_width: int) -> str:
    if num_classes and vector_width:
        raise ValueError(f"the model has num_classes={num_classes} and vector_width={vector_width}, expected one kind.")
    if vector_width:
        return "vectors"
    if isinstance(num_classes, tuple):
        return "several labels" if num_classes else "nothing"
    return "one label" if num_classes else "nothing"


def _kind_of(labels: CheckedLabels | None) -> str:
    if labels is None:
        return "nothing"
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return "vectors"
    return "one label" if labels.ndim == 1 else "several labels"


def drop(
    x: Float[Array, "B ..."], rate: int | float, dropout_keys: Key[Array, " B"] | None, name: str
) -> Float[Array, "B ..."]:
    """Zeroes entries with probability `rate` and scales the rest up; the identity without keys.

    Args:
      x: rows.
      rate: 0 to 1.
      dropout_keys: one a row; layers tell theirs apart by `name`.
      name: of the layer.
    """
    if dropout_keys is None or rate == 0.0:
        return x
    salt = zlib.crc32(name.encode())

    def one(key, row):
        keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, row.shape)
        return jnp.where(keep, row / (1.0 - rate), 0.0).astype(row.dtype)

    return jax.vmap(one)(dropout_keys, x)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], v: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Attention of every position to every other; softmax in float32."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
