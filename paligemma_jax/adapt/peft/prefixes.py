"""Prefix-Tuning and Prompt-Tuning: learned inputs that stand before the text, of every layer or of the first alone.

Prefix-Tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190): M learned keys and values in every attention of the
decoder, read by every query, image patches too. They have no position: queries turn by RoPE, these keys do not (as in
peft). They are parameters themselves; the paper's network that makes them during training is left out.

Prompt-Tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): M learned embeddings between image and BOS, part
of the prefix that reads both ways. They take positions and slots of the cache as M more patches would.

A softmax shares its mass with what is added, so neither can start as nothing at all: keys start small, values at zero,
and embeddings as those of words drawn at random, as both papers advise.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.adapt import attachment
from paligemma_jax.models.gemma import Gemma, GemmaAttention
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError

TRAINABLE_PREFIX = r"decoder/layers/self_attn/prefix_[kv]"
TRAINABLE_PROMPT = r"decoder/soft_prompt"


class PrefixAttention(GemmaAttention):
    """An attention whose queries all read M learned keys and values first, [M, K, H] (stacked: [L, M, K, H])."""

    ADDS = ("prefix_k", "prefix_v")

    prefix_k: nnx.Variable
    prefix_v: nnx.Variable

    def attend(self, q, k, v, mask):
        """As in GemmaAttention."""
        k, v = (_before(prefix[...], rows) for prefix, rows in ((self.prefix_k, k), (self.prefix_v, v)))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (self.prefix_k.shape[0], 0)), constant_values=True)
        return super().attend(q, k, v, mask)


def _before(prefix: Float[Array, "M K H"], rows: Float[Array, "B S K H"]) -> Float[Array, "B MS K H"]:
    """The same M entries in front of every row's."""
    repeated = jnp.broadcast_to(prefix.astype(rows.dtype)[None], (rows.shape[0], *prefix.shape))
    return jnp.concatenate([repeated, rows], axis=1)


class PromptedGemma(Gemma):
    """A decoder with M learned inputs between image and text, `soft_prompt` [M, D]."""

    ADDS = ("soft_prompt",)

    soft_prompt: nnx.Variable

    def context(self, features: Float[Array, "B P D"]) -> Float[Array, "B C D"]:
        """All inputs before the text: the image's features, and the prompt."""
        prompt = self.soft_prompt[...].astype(jnp.float32)
        repeated = jnp.broadcast_to(prompt[None], (len(features), *prompt.shape))
        return jnp.concatenate([features.astype(jnp.float32), repeated], axis=1)


def attach_prefix(model: PaliGemma, length: int = 16, *, rngs: nnx.Rngs) -> PaliGemma:
    """Adds `length` keys and values to every attention of the decoder, in place: 2 L M K H parameters.

    Raises:
      UserError: a length below 1, or a prefix that is there already.
    """
    config, attention = model.config.decoder, model.decoder.layers.self_attn
    _check(length, isinstance(attention, PrefixAttention), "prefix")
    shape = (config.depth, length, config.num_kv_heads, config.head_dim)
    keys = jax.random.normal(rngs.params(), shape) * config.head_dim**-0.5
    attachment.attach(attention, PrefixAttention, prefix_k=nnx.Param(keys), prefix_v=nnx.Param(jnp.zeros(shape)))
    return model


def attach_prompt(model: PaliGemma, length: int = 16, *, rngs: nnx.Rngs) -> PaliGemma:
    """Adds `length` embeddings between image and text, in place: M D parameters, at first those of random words.

    Raises:
      UserError: a length below 1, or a prompt that is there already.
    """
    config = model.config.decoder
    _check(length, isinstance(model.decoder, PromptedGemma), "soft prompt")
    words = jax.random.choice(rngs.params(), config.vocab_size, (1, length), replace=length > config.vocab_size)
    attachment.attach(model.decoder, PromptedGemma, soft_prompt=nnx.Param(model.decoder.embed_tokens(words)[0]))
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
