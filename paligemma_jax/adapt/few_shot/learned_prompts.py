"""Learned prompts in both towers of a dual encoder, and adapters of its embeddings.

CoOp (Zhou et al. 2022, https://arxiv.org/abs/2109.01134): M learned vectors in place of a text's first tokens.
MaPLe (Khattak et al. 2023, https://arxiv.org/abs/2210.03117): prompts in the first K layers of both towers. A
linear map of the text prompts gives the vision prompts, P_v[k] = P_t[k] W[k] + b[k] (coupled). Each of these layers
replaces the prompts of the layer before by its own; layers after the K-th keep them as part of the sequence.
CoPrompt (Roy and Etemad 2024, https://arxiv.org/abs/2306.01195): MaPLe with adapters on the features z of both towers,
m relu(relu(z D) U) + (1 - m) z, before these are scaled to length 1.

All parameters are in one module, `model.prompts`. A call attaches what is computed from them to the layers of a copy of
the model that shares its arrays (prompted_towers.py). With `prompts=False` it computes exactly what the base does, so a
frozen branch needs no second copy of the weights. Axes: see models; M prompts per layer, K layers with prompts, E
embedding width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.few_shot import prompt_config
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.adapt.few_shot.prompted_towers import attach_to_text, attach_to_vision, start_of_prompts
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.numerics import cast
from paligemma_jax.models.projection import contract
from train_jax.core.errors import UserError

TRAINABLE = r"prompts/.*"
"""Pattern of the parameters that train."""

_INITIAL_STD = 0.02  # of prompts that are not initialized from tokens, as in the code of CoOp, MaPLe and CoPrompt


class OutputAdapter(nnx.Module):
    """The adapter m relu(relu(z D) U) + (1 - m) z; parameters are float32, products in the compute dtype."""

    def __init__(self, features: int, hidden: int, mix: int | float, dtype: str, *, rngs: nnx.Rngs):
        self.mix, self.dtype = mix, dtype
        self.down_kernel = nnx.Param(_uniform(rngs, features, (features, hidden)))
        self.up_kernel = nnx.Param(_uniform(rngs, hidden, (hidden, features)))

    def __call__(self, z: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """Returns adapted features in float32."""
        y = jax.nn.relu(_linear(z, self.down_kernel[...], self.dtype))
        y = jax.nn.relu(_linear(y, self.up_kernel[...], self.dtype))
        return self.mix * y + (1.0 - self.mix) * z


class Coupling(nnx.Module):
    """One linear map per layer, from the text tower's width to the vision tower's."""

    def __init__(self, depth: int, text_width: int, vision_width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_uniform(rngs, text_width, (depth, text_width, vision_width)))
        self.bias = nnx.Param(_uniform(rngs, text_width, (depth, vision_width)))

    def __call__(self, text: Float[Array, "K M D"], dtype: str) -> Float[Array, "J M F"]:
        """Returns the vision prompts of the J layers that have a map, from the text prompts of K >= J layers."""
        kernel, bias = self.kernel[...], self.bias[...]
        mapped = jax.vmap(lambda rows, kernel: _linear(rows, kernel, dtype))(text[: len(kernel)], kernel)
        return mapped + bias[:, None]


class Prompts(nnx.Module):
    """The prompts and adapters of a config; those that it does not have are None."""

    def __init__(
        self, config: PromptConfig, model: DualEncoderConfig, text: Float[Array, "K M D"] | None, *, rngs: nnx.Rngs
    ):
        self.config, self.dtype = config, model.text.dtype
        K, width, dtype = config.depths[1], model.vision.width, model.text.dtype
        self.text: nnx.Param | None = nnx.data(None)
        self.vision: nnx.Param | None = nnx.data(None)
        self.coupling: Coupling | None = nnx.data(None)
        self.text_adapter: OutputAdapter | None = nnx.data(None)
        self.image_adapter: OutputAdapter | None = nnx.data(None)
        if text is not None:
            self.text = nnx.Param(text)
        if config.vision_tokens and config.coupled:
            self.coupling = Coupling(K, model.text.width, width, rngs=rngs)
        elif config.vision_tokens:
            self.vision = nnx.Param(_normal(rngs, (K, config.vision_tokens, width)))
        if config.text_adapter:
            self.text_adapter = OutputAdapter(model.embed_dim, config.text_adapter, config.text_mix, dtype, rngs=rngs)
        if config.image_adapter:
            hidden, mix = config.image_adapter, config.image_mix
            self.image_adapter = OutputAdapter(model.embed_dim, hidden, mix, dtype, rngs=rngs)

    def text_prompts(self) -> Float[Array, "K M D"] | None:
        """Returns the prompts of the first K layers of the text tower, float32."""
        return None if self.text is None else self.text[...]

    def vision_prompts(self) -> Float[Array, "K M D"] | None:
        """Returns the prompts of the first K layers of the vision tower, float32."""
        if self.coupling is not None:
            assert self.text is not None, "prompt_config.check asks for as many text prompts as vision prompts"
            return self.coupling(self.text[...], self.dtype)
        return None if self.vision is None else self.vision[...]


class AdaptedDualEncoder(DualEncoder):
    """A dual encoder with adapters of its features, either of which may be None."""

    ADDS = ("text_adapter", "image_adapter")

    text_adapter: OutputAdapter | None
    image_adapter: OutputAdapter | None

    def text_embeds(self, features: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """As in DualEncoder."""
        return super().text_embeds(features if self.text_adapter is None else self.text_adapter(features))

    def image_embeds(self, features: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """As in DualEncoder."""
        return super().image_embeds(features if self.image_adapter is None else self.image_adapter(features))


class PromptedDualEncoder(DualEncoder):
    """A dual encoder with prompts and adapters, which `prompts=False` leaves out of a call."""

    ADDS = ("prompts",)

    prompts: Prompts

    def encode_image(
        self, images: Float[Array, "B I I 3"], dropout_keys=None, *, prompts: bool = True
    ) -> tuple[Float[Array, "B E"], dict]:
        """As in DualEncoder."""
        model = self._view(prompts)
        if prompts and (vision := self.prompts.vision_prompts()) is not None:
            attach_to_vision(model.vision, vision)
        return model.encode_image(images, dropout_keys)

    def embed_features(
        self, x: Float[Array, "B S D"], dropout_keys=None, *, prompts: bool = True
    ) -> tuple[Float[Array, "B E"], dict]:
        """As in DualEncoder."""
        return self._view(prompts).embed_features(x, dropout_keys)

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
        *,
        prompts: bool = True,
    ) -> tuple[Float[Array, "B E"], dict]:
        """As in DualEncoder."""
        model = self._view(prompts)
        if prompts and (text := self.prompts.text_prompts()) is not None:
            attach_to_text(model.text, text)
        return model.encode_text(tokens, mask, dropout_keys)

    def _view(self, with_adapters: bool) -> DualEncoder:
        """Returns a copy of the base that shares its arrays, with or without the adapters of features."""
        model = detach_prompts(nnx.clone(self))
        if with_adapters:
            adapters = {name: getattr(self.prompts, name) for name in AdaptedDualEncoder.ADDS}
            attachment.attach(model, AdaptedDualEncoder, **adapters)
        return model


def attach_prompts(
    model: DualEncoder, config: PromptConfig, *, init_words: Sequence[int] | None = None, rngs: nnx.Rngs
) -> PromptedDualEncoder:
    """Attaches prompts and adapters to a dual encoder, in place.

    They change the embeddings before any training: prompts take part in every softmax, and adapters in the features.

    Args:
      model: without prompts.
      config: sizes of prompts and adapters.
      init_words: token ids, such as `tokenizer.encode("a photo of a")`, whose embeddings initialize the text prompts of
        the first layer, one per prompt; further ids are ignored. None initializes them at random.
      rngs: random keys of the other prompts (normal, standard deviation 0.02), maps and adapters (uniform up to
        1 / sqrt(inputs)).

    Returns:
      The model.

    Raises:
      UserError: a config without prompts and adapters, with contradictions, or that does not fit the model; too few
        token ids; or a model that has prompts already.
    """
    if isinstance(model, PromptedDualEncoder):
        raise UserError("the model has prompts already: detach them before attaching others.")
    prompt_config.check(config, model.config)
    text = None
    if config.text_tokens:
        text = _normal(rngs, (config.depth, config.text_tokens, model.config.text.width))
        if init_words is not None:
            text = text.at[0].set(_embed(model, init_words, config.text_tokens))
    return attach_module(model, Prompts(config, model.config, text, rngs=rngs))


def attach_module(model: DualEncoder, prompts: Prompts) -> PromptedDualEncoder:
    """Attaches prompts and adapters with their parameters to a dual encoder, in place."""
    return attachment.attach(model, PromptedDualEncoder, prompts=prompts)


def detach_prompts(model: DualEncoder) -> DualEncoder:
    """Removes prompts and adapters, in place, which leaves the base."""
    attachment.detach(model, PromptedDualEncoder)
    return model


def check_texts(model: DualEncoder, tokens: Int[np.ndarray, "C T"]) -> None:
    """Checks that the prompts replace only tokens that all texts share.

    In a CLIP the prompts replace the tokens after the start token: those of "a photo of a" in "a photo of a cat.".

    Args:
      model: with or without prompts.
      tokens: class texts.

    Raises:
      UserError: prompts would replace tokens in which the texts differ, or the end of a text.
    """
    start = start_of_prompts(model.config.text)
    count = model.prompts.config.text_tokens if isinstance(model, PromptedDualEncoder) else 0
    if start == 0 or count == 0:  # at the start of SigLIP's texts they replace no token, see insert_placeholders
        return
    replaced = np.asarray(tokens)[:, start : start + count]
    last = model.config.text.eos_token
    ends = (tokens == tokens.max() if last is None else tokens == last).argmax(1)
    wrong = np.flatnonzero((ends < start + count) | (replaced != replaced[:1]).any(1))
    if len(wrong):
        raise UserError(
            f"text {wrong[0]} ends or differs from text 0 within its first {count} tokens, which {count} prompts "
            f"replace, expected {count} tokens at the start that all texts share: begin them with a photo of a, say, "
            "or set fewer text_tokens."
        )


def _embed(model: DualEncoder, ids: Sequence[int], count: int) -> Float[Array, "M D"]:
    """Returns the embeddings of the first `count` token ids."""
    vocab_size = model.config.text.vocab_size
    if len(ids) < count or not all(0 <= token < vocab_size for token in ids):
        raise UserError(
            f"init_words is {list(ids)}, expected {count} ids or more below {vocab_size}, as text_tokens is {count}: "
            "give more ids, from the model's own tokenizer."
        )
    return model.text.token_embedding(jnp.asarray([list(ids)[:count]], jnp.int32))[0]


def _linear(x: Array, kernel: Array, dtype: str) -> Array:
    """Returns x W in float32, multiplied in the compute dtype."""
    return contract(cast(x, jnp.dtype(dtype)), kernel.astype(jnp.dtype(dtype)), 1)


def _uniform(rngs: nnx.Rngs, fan_in: int, shape: tuple[int, ...]) -> Array:
    """Returns initial values as in torch's linear layers, for kernels and biases."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    return _INITIAL_STD * jax.random.normal(rngs.params(), shape)
