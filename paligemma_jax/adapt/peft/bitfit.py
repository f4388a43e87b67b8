"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): the biases train, and the scales of the norms.

Gemma has no biases. In the decoder the scales of its RMSNorms train, the nearest thing there is; the vision tower and
the projector have biases, and norms with both.
"""

import jax.numpy as jnp

from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core import param_tree, patterns

SCALES_AND_BIASES = r".*/(bias|scale)"


def prepare_bitfit(model: PaliGemma, targets: str = SCALES_AND_BIASES) -> PaliGemma:
    """The model with the leaves that match `targets` in float32, to be trained.

    Raises:
      UserError: the pattern matches nothing.
    """
    arrays = param_tree.flatten(model)
    chosen = patterns.select(targets, arrays, what="biases and scales")
    copies = {path: jnp.array(arrays[path], jnp.float32, copy=True) for path in chosen}  # others may hold the base's
    return param_tree.assign(model, copies)
