"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): biases and the scales of norms train.

Gemma has no biases, so in the decoder only the scales of its RMSNorms train; the vision tower and the projector have
biases, and the tower's norms have scales and biases.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from paligemma_jax.adapt.method import Method, not_detachable
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core import param_tree, patterns

SCALES_AND_BIASES = r".*/(bias|scale)"


def prepare_bitfit(model: PaliGemma, targets: str = SCALES_AND_BIASES) -> PaliGemma:
    """Returns the model with the parameters that match `targets` copied to float32, to be trained.

    Raises:
      UserError: the pattern matches nothing.
    """
    arrays = param_tree.flatten(model)
    trained = patterns.select(targets, arrays, what="biases and scales")
    copies = {path: jnp.array(arrays[path], jnp.float32, copy=True) for path in trained}  # the base keeps its arrays
    return param_tree.assign(model, copies)


@dataclasses.dataclass(frozen=True)
class BitFit(Method[PaliGemma]):
    """BitFit, by the protocol of all methods."""

    name: ClassVar[str] = "bitfit"
    keeps_base: ClassVar[bool] = False

    targets: str = SCALES_AND_BIASES

    @property
    def trainable(self) -> str:
        """Pattern of the scales and biases."""
        return self.targets

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """Returns another model; the one given does not change."""
        return prepare_bitfit(model, self.targets)

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """Raises UserError."""
        raise not_detachable(cls.name)

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """Returns the model, which is plain."""
        return model
