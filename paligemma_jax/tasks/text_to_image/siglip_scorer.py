"""Scores images of single objects with a SigLIP: the share in which it finds the described attributes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.inference.attribute_scoring import attribute_hits
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.zero_shot import embed_images

Images = UInt8[np.ndarray, "N I I 3"]


class SigLIPScorer:
    """Zero-shot accuracies of a SigLIP on samples and on real images, as a `flow_jax` score.

    Args:
      model, tokenizer: of the SigLIP.
      attributes: {name: value} of each description, by its number; see synthetic_clevr.conditioning.
      real: real images and the numbers of their descriptions, for comparison.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: TextTokenizer,
        attributes: Sequence[Mapping[str, str]],
        real: tuple[Images, Int[np.ndarray, " N"]],
    ):
        self._model, self._tokenizer, self._attributes, self._real = model, tokenizer, attributes, real
        self._images: list[np.ndarray] = []
        self._labels: list[int] = []

    def add(self, images: Images, labels: Int[np.ndarray, " N"]) -> None:
        """Adds a batch of samples and the numbers of their descriptions."""
        self._images += list(images)
        self._labels += labels.tolist()

    def results(self) -> dict[str, Any]:
        """Returns `accuracy_color`, `_shape`, `_material` and `_size`, each over samples whose description names it.

        `accuracy` is their mean; `accuracy_all` is the share of samples with all described attributes; `..._data` are
        the same for the real images.
        """
        samples = self._accuracies(self._images, self._labels)
        real = self._accuracies(list(self._real[0]), self._real[1].tolist())
        return samples | {f"{name}_data": value for name, value in real.items()}

    def _accuracies(self, images: list[np.ndarray], labels: list[int]) -> dict[str, float]:
        objects = [self._attributes[label] for label in labels]
        hits = attribute_hits(self._model, self._tokenizer, embed_images(self._model, images), objects)
        all_hit = np.ones(len(images), bool)
        for name, values in hits.items():
            all_hit[[row for row, item in enumerate(objects) if name in item]] &= values
        accuracies = {f"accuracy_{name}": float(values.mean()) for name, values in hits.items() if len(values)}
        mean = float(np.mean(list(accuracies.values()))) if accuracies else float("nan")
        return {"accuracy": mean, "accuracy_all": float(all_hit.mean())} | accuracies
