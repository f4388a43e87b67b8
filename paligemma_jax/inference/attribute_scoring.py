"""Zero-shot recognition of the attributes of single objects by a SigLIP: colour, shape, material and size.

Axes: N images, E of an embedding.
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
    """Returns, by attribute, whether the model ranks the right value first, for the images that have a right value.

    Args:
      images: embeddings.
      objects: the right values of each image: attribute to value, such as {"color": "red"}; attributes that are left
        out are not scored.
    """
    hits = {}
    for name, templates in TEMPLATES.items():
        values = list(ATTRIBUTES[name])
        rows = [row for row, item in enumerate(objects) if name in item]
        scores = images[rows] @ zero_shot.class_embeddings(model, tokenizer, values, templates).T
        hits[name] = scores.argmax(1) == np.array([values.index(objects[row][name]) for row in rows], int)
    return hits
