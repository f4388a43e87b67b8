"""Prefix tuning and prompt tuning: learned inputs before the text, in every layer or in the first alone.

Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190): M learned keys and values in every attention of the
decoder, to which all queries attend, also those of image patches. The keys have no rotary position (as in peft). They
are parameters themselves; the network of the paper that computes them in training is omitted.

Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): M learned embeddings between image and BOS, part
of the bidirectional prefix. They use positions and cache slots like M more patches.

Both change the output before any training, since every softmax includes them: keys are initialized small, values to
zero, and embeddings to those of random tokens, as both papers advise.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.method import Method, not_mergeable
from paligemma_jax.models.attention import TokenMask
from paligemma_jax.models.gemma import Gemma, GemmaAttention
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError

TRAINABLE_PREFIX = r"decoder/layers/self_attn/prefix_[kv]"
TRAINABLE_PROMPT = r"decoder/soft_prompt"


class PrefixAttention(GemmaAttention):
    """An attention with M learned keys and values for all queries, [M, K, H] (stacked: [L, M, K, H])."""

    ADDS = ("prefix_k", "prefix_v")

    prefix_k: nnx.Variable
    prefix_v: nnx.Variable

    def attend(self, q, k, v, mask):
        """As in GemmaAttention."""
        k, v = (_prepend(prefix[...], rows) for prefix, rows in ((self.prefix_k, k), (self.prefix_v, v)))
        if isinstance(mask, TokenMask):
            mask = mask.dense()  # which leaves attention to the plain kernel
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (self.prefix_k.shape[0], 0)), constant_values=True)
        return super().attend(q, k, v, mask)


def _prepend(prefix: Float[Array, "M K H"], rows: Float[Array, "B S K H"]) -> Float[Array, "B MS K H"]:
    """Prepends the same M entries to every row."""
    repeated = jnp.broadcast_to(prefix.astype(rows.dtype)[None], (rows.shape[0], *prefix.shape))
    return jnp.concatenate([repeated, rows], axis=1)


class PromptedGemma(Gemma):
    """A decoder with M learned inputs between image and text, `soft_prompt` [M, D]."""

    ADDS = ("soft_prompt",)

    soft_prompt: nnx.Variable

    def context(self, features: Float[Array, "B P D"]) -> Float[Array, "B C D"]:
        """Returns all inputs before the text: the image features and the prompt."""
        prompt = self.soft_prompt[...].astype(jnp.float32)
        repeated = jnp.broadcast_to(prompt[None], (len(features), *prompt.shape))
        return jnp.concatenate([features.astype(jnp.float32), repeated], axis=1)


def attach_prefix(model: PaliGemma, length: int = 16, *, rngs: nnx.Rngs) -> PaliGemma:
    """Adds `length` keys and values to every attention of the decoder, in place: 2 L M K H parameters.

    Raises:
      UserError: a length below 1, or a model that has a prefix already.
    """
    config, attention = model.config.decoder, model.decoder.layers.self_attn
    _check(length, isinstance(attention, PrefixAttention), "prefix")
    shape = (config.depth, length, config.num_kv_heads, config.head_dim)
    keys = jax.random.normal(rngs.params(), shape) * config.head_dim**-0.5
    attachment.attach(attention, PrefixAttention, prefix_k=nnx.Param(keys), prefix_v=nnx.Param(jnp.zeros(shape)))
    return model


def attach_prompt(model: PaliGemma, length: int = 16, *, rngs: nnx.Rngs) -> PaliGemma:
    """Adds `length` embeddings between image and text, in place: M D parameters, initialized from random tokens.

    Raises:
      UserError: a length below 1, or a model that has a prompt already.
    """
    config = model.config.decoder
    _check(length, isinstance(model.decoder, PromptedGemma), "soft prompt")
    tokens = jax.random.choice(rngs.params(), config.vocab_size, (1, length), replace=length > config.vocab_size)
    attachment.attach(model.decoder, PromptedGemma, soft_prompt=nnx.Param(model.decoder.embed_tokens(tokens)[0]))
    return model


def _check(length: int, present: bool, what: str) -> None:
    if length < 1:
        raise UserError(f"the {what}'s length is {length}, expected 1 or more: raise it.")
    if present:
        raise UserError(f"the model has a {what} already: detach it before attaching another.")


def detach_prefix(model: PaliGemma) -> PaliGemma:
    """Removes the keys and values, in place."""
    attachment.detach(model.decoder.layers.self_attn, PrefixAttention)
    return model


def detach_prompt(model: PaliGemma) -> PaliGemma:
    """Removes the embeddings, in place."""
    attachment.detach(model.decoder, PromptedGemma)
    return model


@dataclasses.dataclass(frozen=True)
class Prefix(Method[PaliGemma]):
    """Prefix tuning, by the protocol of all methods."""

    name: ClassVar[str] = "prefix"
    modules: ClassVar = (PrefixAttention,)

    size: int = 16  # length in tokens

    @property
    def trainable(self) -> str:
        """Pattern of the keys and values."""
        return TRAINABLE_PREFIX

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        return attach_prefix(model, self.size, rngs=rngs)

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """As in Method."""
        return detach_prefix(model)

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """Raises UserError."""
        raise not_mergeable("a prefix", "its keys and values come from no input")


@dataclasses.dataclass(frozen=True)
class Prompt(Method[PaliGemma]):
    """Prompt tuning, by the protocol of all methods."""

    name: ClassVar[str] = "prompt"
    modules: ClassVar = (PromptedGemma,)

    size: int = 16  # length in tokens

    @property
    def trainable(self) -> str:
        """Pattern of the embeddings."""
        return TRAINABLE_PROMPT

    @property
    def extra_inputs(self) -> int:
        """Number of learned embeddings between image and text."""
        return self.size

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        return attach_prompt(model, self.size, rngs=rngs)

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """As in Method."""
        return detach_prompt(model)

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """Raises UserError."""
        raise not_mergeable("a soft prompt", "its embeddings belong to no token")
