"""Consistency with the frozen model (`config.consistency`), which reduces forgetting while a model is tuned.

  L = L_answers + weight (C_answers + C_images)
  C_answers   KL(frozen || tuned) of the next token, mean over the supervised tokens (losses/chunked_kl.py)
  C_images    distance of tuned and frozen image features, mean over patches (losses/coprompt.py)

The frozen branch is the model itself without its adapters: there is no second copy of the weights, and none of its
activations are stored. With `prompts`, C_answers is computed on these texts after the row's image in place of the row's
own question; a row draws one text in each step. In the mean a row has the weight of its answer in L_answers. Axes: see
models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from paligemma_jax.adapt.peft.methods import KEEP_BASE, base_of
from paligemma_jax.data.prompts import make_example, training_arrays
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.losses import consistency_loss, token_divergence
from paligemma_jax.losses.coprompt import DISTANCES
from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.vqa.features import batch_features
from train_jax.core import param_tree
from train_jax.core.config_keys import key
from train_jax.core.errors import UserError, quoted

TERMS = {"answers": ("answers",), "images": ("images",), "both": ("answers", "images")}


class TunedForward(NamedTuple):
    """Results of the forward pass of the tuned model on a batch, from which the loss is computed too."""

    features: jax.Array  # [B, P, D]
    hidden: jax.Array  # [B, T, D]
    arrays: Mapping[str, jax.Array]  # of data.prompts.training_arrays, [B, T] each
    keys: jax.Array | None = None  # of its dropout, [B]


@dataclasses.dataclass(frozen=True)
class Keys:
    """`config.consistency`."""

    weight: float = key(0.0, "weight of consistency with the frozen model in the loss; 0 = not computed", minimum=0)
    on: str = key(
        "answers",
        "what is kept consistent: distributions of answer tokens, image features (of an adapted tower or "
        "projector), or both",
        choices=TERMS,
    )
    kind: str = key("cosine", "distance of image features", choices=DISTANCES)
    temperature: float = key(1.0, "temperature of both distributions of the next token", above=0)
    prompts: tuple = key(
        (),
        "pairs (prefix, continuation), such as (('caption en', 'a red'),), of the texts whose next tokens are "
        "compared, at the end of the prefix and after every token of the continuation; () = the row's own question "
        "and answer",
    )


def check(config: ConfigDict) -> None:
    """Checks the values, without data or model.

    Raises:
      UserError: the first fault.
    """
    consistency, name = config.consistency, config.adapter.name
    for pair in consistency.prompts:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(
                f"consistency.prompts holds {quoted(pair)}, expected pairs of a prefix and a continuation, such as "
                "(('caption en', 'a small'),): correct it."
            )
    if consistency.weight and name not in KEEP_BASE:
        raise UserError(
            f"consistency.weight is {consistency.weight} beside adapter.name={name!r}, which trains parameters of the "
            f"base, so that no frozen model is left, expected one of {', '.join(KEEP_BASE)}: change one of "
            "the two."
        )


def check_paths(config: ConfigDict, trained: list[str]) -> None:
    """Raises UserError if consistency of image features is asked for but none of the `trained` paths changes them."""
    on = config.consistency.on
    if config.consistency.weight and "images" in TERMS[on] and all(path.startswith("decoder/") for path in trained):
        raise UserError(
            f"consistency.on is {on!r} but nothing of the tower or the projector trains, so the image features do "
            "not change: set consistency.on=answers, or let adapter.targets reach one of them."
        )


def parts(consistency: ConfigDict) -> tuple[str, ...]:
    """Returns the terms that are computed, of "answers" and "images"."""
    return TERMS[consistency.on] if consistency.weight else ()


class Consistency:
    """Computes the terms of a run whose weight is not 0."""

    def __init__(self, config: ConfigDict, adapter: str, tokenizer: Tokenizer):
        """Tokenizes the prompts.

        Args:
          config: `config.consistency`.
          adapter: `adapter.name`, one of `adapt.peft.methods.KEEP_BASE`.
          tokenizer: of the model.
        """
        self._config, self._adapter = config, adapter
        self._prompts = _tokenize(tokenizer, config.prompts) if config.prompts else None

    def terms(
        self,
        model: PaliGemma,
        batch: Mapping[str, jax.Array],
        tuned: TunedForward,
        weights: Float[Array, "B T"],
        keys,
        lm_head: Mapping[str, Any],
    ) -> dict[str, Float[Array, ""]]:
        """Returns the terms of `parts` among C_answers and C_images, each times the sum of the weights.

        Args:
          model: the tuned model.
          batch: of the loss.
          tuned: the forward pass of `model` on `batch`.
          weights: of the target tokens, as in the loss.
          keys: one for each example.
          lm_head: the vocabulary projection's arguments of `losses.token_divergence`.
        """
        base = base_of(model, self._adapter)
        features = tuned.features
        if not _same_image_paths(model, base):
            features = batch_features(base, batch)
        features, rows = lax.stop_gradient(features), weights.sum(axis=1)
        terms = {}
        for part in parts(self._config):
            if part == "images":
                terms[part] = _image_term(tuned.features, features, rows, self._config.kind)
            elif self._prompts is None:
                terms[part] = self._answer_term(base, tuned.hidden, features, tuned.arrays, weights, lm_head)
            else:
                arrays = _draw(self._prompts, keys)
                hidden = model.hidden_of_texts(tuned.features, arrays, tuned.keys)
                share = arrays["weights"] / arrays["weights"].sum(axis=1, keepdims=True)
                terms[part] = self._answer_term(base, hidden, features, arrays, rows[:, None] * share, lm_head)
        return terms

    def _answer_term(self, base, hidden, features, arrays, weights, lm_head) -> Float[Array, ""]:
        frozen = lax.stop_gradient(base.hidden_of_texts(features, arrays))
        return token_divergence(hidden, frozen, weights=weights, temperature=self._config.temperature, **lm_head)


def _same_image_paths(model: PaliGemma, base: PaliGemma) -> bool:
    """Returns whether the base has the same image features, as nothing is attached to its tower or projector."""
    return all(
        param_tree.abstract(getattr(model, part)).keys() == param_tree.abstract(getattr(base, part)).keys()
        for part in ("vision", "projector")
    )


def _image_term(
    tuned: Float[Array, "B P D"], frozen: Float[Array, "B P D"], rows: Float[Array, " B"], kind: str
) -> Float[Array, ""]:
    """Returns C_images times the sum of the rows' weights; a patch has the weight of its row."""
    patches, width = tuned.shape[1:]
    distance = consistency_loss(tuned.reshape(-1, width), frozen.reshape(-1, width), kind, jnp.repeat(rows, patches))
    return rows.sum() * distance


def _tokenize(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Returns `training_arrays` of the texts, [K, T] each."""
    lengths = [len(tokenizer.encode(prefix)) + len(tokenizer.encode(suffix)) for prefix, suffix in texts]
    length = 1 + max(lengths) + len(tokenizer.separator_ids)  # EOS is only a target
    examples = [make_example(tokenizer, prefix, suffix, length) for prefix, suffix in texts]
    return training_arrays({name: np.stack([example[name] for example in examples]) for name in examples[0]})


def _draw(texts: Mapping[str, np.ndarray], keys) -> dict[str, jax.Array]:
    """Draws one of the texts for each row, [B, T], a function of the row's key alone."""
    count = len(texts["tokens"])
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(fold_in_name(keys, "consistency"))
    return {name: jnp.asarray(array)[chosen] for name, array in texts.items()}
