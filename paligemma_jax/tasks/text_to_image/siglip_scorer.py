"""A SigLIP judges pictures of single objects: does it see in them what was asked for?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.inference.attributes import attribute_hits
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.zero_shot import embed_images

Images = UInt8[np.ndarray, "N I I 3"]


class SigLIPScorer:
    """Collects samples, and tells how often the SigLIP finds in them what their descriptions say.

    Args:
      model, tokenizer: of the SigLIP.
      said: by number of a description what it names, see synthetic_clevr.descriptions.
      real: images and the numbers of their descriptions, to compare with.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: TextTokenizer,
        said: Sequence[Mapping[str, str]],
        real: tuple[Images, Int[np.ndarray, " N"]],
    ):
        self._model, self._tokenizer, self._said, self._real = model, tokenizer, said, real
        self._images: list[np.ndarray] = []
        self._labels: list[int] = []

    def add(self, images: Images, labels: Int[np.ndarray, " N"]) -> None:
        """Takes in samples and the numbers of what was asked for."""
        self._images += list(images)
        self._labels += labels.tolist()

    def results(self) -> dict[str, Any]:
        """`accuracy_color`, `_shape`, `_material` and `_size`, each over the samples whose description names it.

        `accuracy` is their mean, `accuracy_all` how often all that was said is there; `..._data` are those of the real
        images.
        """
        drawn = self._judged(self._images, self._labels)
        real = self._judged(list(self._real[0]), self._real[1].tolist())
        return drawn | {f"{name}_data": value for name, value in real.items()}

    def _judged(self, images: list[np.ndarray], labels: list[int]) -> dict[str, float]:
        objects = [self._said[label] for label in labels]
        right = attribute_hits(self._model, self._tokenizer, embed_images(self._model, images), objects)
        whole = np.ones(len(images), bool)
        for name, values in right.items():
            whole[[row for row, item in enumerate(objects) if name in item]] &= values
        found = {f"accuracy_{name}": float(values.mean()) for name, values in right.items() if len(values)}
        mean = float(np.mean(list(found.values()))) if found else float("nan")
        return {"accuracy": mean, "accuracy_all": float(whole.mean())} | found
