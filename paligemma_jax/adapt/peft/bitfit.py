"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): biases and the scales of norms train.

Gemma has no biases, so in the decoder only the scales of its RMSNorms train; the vision tower and the projector have
biases, and the tower's norms have scales and biases.
"""

import jax.numpy as jnp

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
