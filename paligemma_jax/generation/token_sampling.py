"""Samples the next token from logits: greedy, temperature, top-k and nucleus, with one key per row and step.

Axes: B rows, V vocabulary, K token ids.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from train_jax.core.errors import UserError, quoted

OPTIONS: dict[str, dict[str, float | int]] = {
    "greedy": {"draft_tokens": 0},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "beam": {"num_beams": 4, "length_penalty": 1.0},
}
"""The samplers, the options of each, and their defaults."""

_MIN_TEMPERATURE = 1e-6  # a divisor in place of 0; sampling multiplies by the temperature, so 0 is exactly greedy

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """A sampler with its options, made by `make_sampler`; under jit only its strings and integers are static."""

    name: str = dataclasses.field(metadata=_static)
    top_k: int = dataclasses.field(default=0, metadata=_static)
    num_beams: int = dataclasses.field(default=1, metadata=_static)
    draft_tokens: int = dataclasses.field(default=0, metadata=_static)
    temperature: float | Array = 1.0
    top_p: float | Array = 1.0
    length_penalty: float | Array = 1.0

    @property
    def inputs(self) -> int:
        """Number of tokens that a step runs for each row: one for each beam, or the newest and its drafts."""
        return self.num_beams + self.draft_tokens


def make_sampler(name: str, **options: float | int | None) -> TokenSampler:
    """Makes a sampler by name; options that are None take the default in `OPTIONS`.

    Raises:
      UserError: an unknown name, an option that this sampler does not have, or a value out of range.
    """
    if name not in OPTIONS:
        raise UserError(f"sampler is {name!r}, expected one of {', '.join(OPTIONS)}: choose one of these.")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in OPTIONS[name]:
            takes = ", ".join(OPTIONS[name]) or "no option"
            users = " or ".join(repr(other) for other, names in OPTIONS.items() if option in names)
            other = f" or choose sampler {users}" if users else ""
            raise UserError(f"sampler {name!r} takes {takes}, not {option}: leave it out{other}.")
    for option, value in given.items():
        default = OPTIONS[name][option]
        if not _is_number(value, whole=isinstance(default, int)):
            kind = "whole" if isinstance(default, int) else "finite"
            raise UserError(f"{option} is {quoted(value)}, expected a {kind} number: set it to, say, {default}.")
    settings = OPTIONS[name] | given
    for option, smallest in (("temperature", 0), ("top_k", 1), ("num_beams", 1), ("draft_tokens", 0)):
        if settings.get(option, smallest) < smallest:
            raise UserError(f"{option} is {settings[option]}, expected at least {smallest}: raise it.")
    if not 0 < settings.get("top_p", 1.0) <= 1:
        raise UserError(f"top_p is {settings['top_p']}, expected a probability mass in (0, 1]: choose, say, 0.9.")
    # Cast to the type of the default: an int in place of a float would make jit compile again.
    fields: dict[str, Any] = {option: type(OPTIONS[name][option])(value) for option, value in settings.items()}
    return TokenSampler(name, **fields)


def _is_number(value: Any, whole: bool) -> bool:
    """Returns whether a value is a finite number, and a whole one if `whole`."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        return False
    return math.isfinite(number) and (number.is_integer() or not whole)


def row_keys(key: Key[Array, ""], rows: int, first: Int[Array, ""] | int = 0) -> Key[Array, " B"]:
    """Returns one key per row, fold_in(key, first + row), which depends on the key and the row's number alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(rows))


def sample_tokens(
    sampler: TokenSampler, logits: Float[Array, "B V"], keys: Key[Array, " B"], step: Int[Array, ""] | int
) -> Int[Array, " B"]:
    """Samples the next token of every row.

    A sample from softmax(logits / temperature) is argmax(logits + temperature * Gumbel noise), which at temperature 0
    is greedy decoding without a special case.

    Args:
      sampler: any but "beam".
      logits: float32; -inf excludes a token.
      keys: from `row_keys`.
      step: index of the new token in its row, folded into the keys.
    """
    if sampler.name == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampler.name == "top_k":
        logits = jnp.where(top_k_mask(logits, sampler.top_k), logits, -jnp.inf)
    if sampler.name == "nucleus":
        scaled = logits / jnp.maximum(sampler.temperature, _MIN_TEMPERATURE)
        logits = jnp.where(nucleus_mask(scaled, sampler.top_p), logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return jnp.argmax(logits + sampler.temperature * noise, axis=-1).astype(jnp.int32)


def top_k_mask(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """Returns True on the k largest logits of a row (all of them if V is smaller); ties go to the lower ids."""
    _, ids = lax.top_k(logits, min(k, logits.shape[-1]))
    return _scatter(logits.shape, ids, jnp.ones(ids.shape, bool))


def nucleus_mask(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Bool[Array, "B V"]:
    """Returns True on the smallest set of most likely tokens of total probability >= top_p (Holtzman et al. 2020).

    Ties go to the lower ids; the most likely token is always in the set. top_p = 1 keeps every token.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    mass_before = jnp.pad(jnp.cumsum(probabilities, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    keep = (mass_before < top_p) | (top_p >= 1)  # a rounded sum may reach 1 before the last token
    return _scatter(logits.shape, order, keep)


def _scatter(shape: tuple[int, ...], ids: Int[Array, "B K"], values: Bool[Array, "B K"]) -> Bool[Array, "B V"]:
    """Returns a mask that is False but at `ids`, where it has `values`."""
    return jnp.zeros(shape, bool).at[jnp.arange(shape[0])[:, None], ids].set(values)
