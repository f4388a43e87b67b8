"""`config.consistency`: the tuned model stays near the frozen one, so that it forgets less of what it is not tuned on.

  L = L_answers + weight (C_answers + C_images)
  C_answers   KL(frozen || tuned) of the next word, mean over the supervised tokens (losses/chunked_kl.py)
  C_images    distance of tuned and frozen image features, mean over patches (losses/coprompt.py)

The frozen branch is the model itself without its adapters: no second copy of the weights, and no activations of it are
kept. With `prompts`, C_answers is of these texts behind the row's image in place of the row's own question; a row draws
one in each step. In the mean a row weighs what its answer weighs in L_answers. Axes: see models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from paligemma_jax.adapt.peft import methods as family
from paligemma_jax.data.prompts import make_example, training_arrays
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.losses import consistency_loss, token_divergence
from paligemma_jax.losses.coprompt import KINDS
from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core import param_tree
from train_jax.core.config_keys import key
from train_jax.core.errors import UserError, quoted

SIDES = {"answers": ("answers",), "images": ("images",), "both": ("answers", "images")}


class Tuned(NamedTuple):
    """What the loss has computed of the tuned model."""

    features: jax.Array  # [B, P, D]
    hidden: jax.Array  # [B, T, D]
    arrays: Mapping[str, jax.Array]  # of data.prompts.training_arrays, [B, T] each
    keys: jax.Array | None = None  # of its dropout, [B]


@dataclasses.dataclass(frozen=True)
class Keys:
    """`config.consistency`."""

    weight: float = key(0.0, "of consistency beside the loss; 0 leaves it out of the program", minimum=0)
    on: str = key("answers", "images need a tower or a projector that is adapted", choices=SIDES)
    kind: str = key("cosine", "distance of image features", choices=KINDS)
    temperature: float = key(1.0, "of both next-token distributions", above=0)
    prompts: tuple = key(
        (),
        "((prefix, continuation), ...): texts whose next tokens are compared, such as (('caption en', 'a red'),), at "
        "the end of the prefix and after every token of the continuation; () = the rows' own",
    )


def check(config: ConfigDict) -> None:
    """Checks the values on their own.

    Raises:
      UserError: the first fault found.
    """
    consistency, name = config.consistency, config.adapter.name
    for pair in consistency.prompts:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(
                f"consistency.prompts holds {quoted(pair)}, expected pairs of a prefix and a continuation, such as "
                "(('caption en', 'a small'),): correct it."
            )
    if consistency.weight and name not in family.DETACH:
        raise UserError(
            f"consistency.weight is {consistency.weight} beside adapter.name={name!r}, which trains parameters of the "
            f"base, so that no frozen model is left, expected one of {', '.join(family.DETACH)}: change one of the two."
        )


def check_paths(config: ConfigDict, trained: list[str]) -> None:
    """Raises UserError for a consistency of image features that cannot change, given the paths that train."""
    on = config.consistency.on
    if config.consistency.weight and "images" in SIDES[on] and all(path.startswith("decoder/") for path in trained):
        raise UserError(
            f"consistency.on is {on!r} but nothing of the tower or the projector trains, so image features stay what "
            "they are: set consistency.on=answers, or let adapter.targets reach one of them."
        )


def parts(consistency: ConfigDict) -> tuple[str, ...]:
    """What of "answers" and "images" is computed."""
    return SIDES[consistency.on] if consistency.weight else ()


class Consistency:
    """The terms of a run whose weight is not 0."""

    def __init__(self, task):
        """`task` is the VQA task."""
        self._task, self._config = task, task.config.consistency
        texts = self._config.prompts
        self._prompts = _tokenized(task.tokenizer, texts) if texts else None

    def terms(
        self, model: PaliGemma, batch: Mapping[str, jax.Array], tuned: Tuned, weights: Float[Array, "B T"], keys
    ) -> dict[str, Float[Array, ""]]:
        """C_answers and C_images, those of `parts`, each times the sum of the weights.

        Args:
          model: the tuned one.
          batch: of the loss.
          tuned: what the loss computed of it.
          weights: of the target tokens, as of the loss.
          keys: one an example.
        """
        base = family.base_of(model, self._task.config.adapter.name)
        features = tuned.features
        if not _same_images(model, base):
            features = self._task.features(base, batch)
        features, rows = lax.stop_gradient(features), weights.sum(axis=1)
        terms = {}
        for part in parts(self._config):
            if part == "images":
                terms[part] = _images(tuned.features, features, rows, self._config.kind)
            elif self._prompts is None:
                terms[part] = self._answers(model, base, tuned.hidden, features, tuned.arrays, weights)
            else:
                arrays = _drawn(self._prompts, keys)
                hidden = model.hidden_of_texts(tuned.features, arrays, tuned.keys)
                share = arrays["weights"] / arrays["weights"].sum(axis=1, keepdims=True)
                terms[part] = self._answers(model, base, hidden, features, arrays, rows[:, None] * share)
        return terms

    def _answers(self, model, base, hidden, features, arrays, weights) -> Float[Array, ""]:
        frozen = lax.stop_gradient(base.hidden_of_texts(features, arrays))
        words, temperature = self._task.words(model), self._config.temperature
        return token_divergence(hidden, frozen, weights=weights, temperature=temperature, **words)


def _same_images(model: PaliGemma, base: PaliGemma) -> bool:
    """Whether image features are those of the base: nothing is attached to the tower or to the projector."""
    return all(
        param_tree.abstract(getattr(model, part)).keys() == param_tree.abstract(getattr(base, part)).keys()
        for part in ("vision", "projector")
    )


def _images(
    tuned: Float[Array, "B P D"], frozen: Float[Array, "B P D"], rows: Float[Array, " B"], kind: str
) -> Float[Array, ""]:
    """C_images times the sum of the rows' weights: a row's is that of each of its patches."""
    patches, width = tuned.shape[1:]
    distance = consistency_loss(*(x.reshape(-1, width) for x in (tuned, frozen)), kind, jnp.repeat(rows, patches))
    return rows.sum() * distance


def _tokenized(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """`training_arrays` of the texts, [K, T] each."""
    lengths = [len(tokenizer.encode(prefix)) + len(tokenizer.encode(suffix)) for prefix, suffix in texts]
    length = 1 + max(lengths) + len(tokenizer.separator_ids)  # EOS is only a target
    examples = [make_example(tokenizer, prefix, suffix, length) for prefix, suffix in texts]
    return training_arrays({name: np.stack([example[name] for example in examples]) for name in examples[0]})


def _drawn(texts: Mapping[str, np.ndarray], keys) -> dict[str, jax.Array]:
    """One of the texts a row, [B, T], by the row's key alone."""
    count = len(texts["tokens"])
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(fold_in_name(keys, "consistency"))
    return {name: jnp.asarray(array)[chosen] for name, array in texts.items()}
