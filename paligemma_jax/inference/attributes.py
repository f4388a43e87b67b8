"""What a SigLIP sees in pictures of single objects: their colour, shape, material and size, zero-shot.

Axes: N pictures, E of an embedding.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from paligemma_jax import zero_shot
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.models.dual_encoder import DualEncoder

TEMPLATES = {
    "color": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
    "shape": ("a {}", "a large {}", "a small {}", "one object: a {}"),
    "material": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
    "size": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
}


def attribute_hits(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    images: Float[np.ndarray, "N E"],
    objects: Sequence[Mapping[str, str]],
) -> dict[str, Bool[np.ndarray, " n"]]:
    """By attribute, for the pictures that have a right answer, whether the model finds it the likeliest.

    Args:
      images: embeddings.
      objects: of each picture what is right: attribute to value, such as {"color": "red"}; those left out do not count.
    """
    found = {}
    for name, templates in TEMPLATES.items():
        values = list(ATTRIBUTES[name])
        asked = [row for row, item in enumerate(objects) if name in item]
        scores = images[asked] @ zero_shot.class_embeddings(model, tokenizer, values, templates).T
        found[name] = scores.argmax(1) == np.array([values.index(objects[row][name]) for row in asked], int)
    return found
