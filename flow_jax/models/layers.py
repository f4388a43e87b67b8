"""Layers that the velocity models share: time features, label embeddings, dropout and attention.

Models are called as model(t, x, labels=None, dropout_keys=None). t is a scalar or [B], with t = 0 noise and t = 1 data;
labels are the conditions of the rows (`Condition`); dropout uses one key per row, so that the noise of a row does not
depend on its batch.
"""

import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from flow_jax.arrays import BatchArray, CheckedLabels, CheckedTime, as_time, check_args

MAX_PERIOD = 10_000
TIME_SCALE = 1000.0  # maps times in [0, 1] to the steps 0 to 1000 of DDPM's features (Ho et al. 2020)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def batch_times(t: CheckedTime, x: BatchArray) -> Float[Array, " B"]:
    """Returns one time for each row, in float32. Raises UserError unless t is a scalar or [B]."""
    return jnp.broadcast_to(as_time(t, x).astype(jnp.float32), x.shape[:1])


def time_features(t: Float[Array, " B"], width: int) -> Float[Array, "B {width}"]:
    """Returns cosines and sines of 1000 t at geometric frequencies, as in DDPM (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) / half * jnp.arange(half))
    angles = TIME_SCALE * t[:, None] * frequencies[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return jnp.pad(features, ((0, 0), (0, width - 2 * half)))


def linear(
    features_in: int, features_out: int, *, zero: bool = False, dtype: str | None = None, rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a linear layer; with `zero` its kernel starts at zero, so that a residual branch starts as the identity.

    `dtype` is that of the computation; None: the dtype of inputs and parameters.
    """
    make = functools.partial(nnx.Linear, kernel_init=nnx.initializers.zeros_init()) if zero else nnx.Linear
    return make(features_in, features_out, dtype=dtype, rngs=rngs)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of jax.nn by name. Raises ValueError for an unknown name."""
    functions = {**vars(jax.nn), "selu": selu}
    if not callable(functions.get(name)):
        raise ValueError(f"the activation is {name!r}, expected a function of jax.nn, such as silu, gelu or selu.")
    return functions[name]


def selu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns SELU (Klambauer et al. 2017), with an absolute error of the rounding of 1.

    jax.nn.selu uses expm1, which is accurate relative to x near 0, but takes a fifth of the time of an MLP on a CPU.
    """
    negative = jnp.where(x > 0, 0, x)  # avoids overflow, also in the gradient
    return SELU_SCALE * jnp.where(x > 0, x, SELU_ALPHA * (jnp.exp(negative) - 1))


class Condition(nnx.Module):
    """Embeds time and, if the model has them, labels as one vector per row.

    A model has one kind of labels; each kind has a null label, which means "no label" (losses.drop_labels):

      num_classes=10        int [B]       one of ten classes; null is 10
      num_classes=(2, 8)    int [B, 2]    an attribute of two values and one of eight; null is (2, 8)
      vector_width=128      float [B, E]  vectors, such as embeddings of texts; null is zeros
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
            return nnx.Embed(number + 1, width, dtype=dtype, rngs=rngs)

        self.label = embed(num_classes) if num_classes and not isinstance(num_classes, tuple) else None
        self.labels = nnx.List([embed(number) for number in num_classes] if isinstance(num_classes, tuple) else [])
        # Without a bias, so that zeros mean "no label".
        self.vector = nnx.Linear(vector_width, width, use_bias=False, dtype=dtype, rngs=rngs) if vector_width else None

    def __call__(self, t: Float[Array, " B"], labels: CheckedLabels | None) -> Float[Array, "B D"]:
        """Returns the condition vectors; raises ValueError for labels of another kind than the model's."""
        check_args((labels,), t)
        kind = _kind_of(labels)
        if kind != self.kind:
            raise ValueError(f"the model takes {self.kind} for each row, but got {kind}.")
        c = self.time_out(jax.nn.silu(self.time_in(time_features(t, self.time_width))))
        if labels is None:
            return c
        labels = jnp.asarray(labels)
        if self.label is not None:
            return c + self.label(labels)
        if self.vector is not None:
            return c + self.vector(labels)
        return c + sum(table(labels[:, column]) for column, table in enumerate(self.labels))


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
    """Sets entries to zero with probability `rate` and scales the others up; the identity without keys.

    Args:
      x: activations.
      rate: 0 to 1.
      dropout_keys: one for each row.
      name: of the layer, from which its noise is derived together with the key.
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
    """Returns the attention of every position to all positions; the softmax is in float32."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
