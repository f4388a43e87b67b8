"""Data of a contrastive run: synthetic scenes, a JSONL file, or a data set of TFDS."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.records import RecordSource, Subset
from paligemma_jax.data.sources.captioned import CaptionedRecords, CaptionedScenes
from paligemma_jax.data.sources.splits import open_source
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.tasks import common
from paligemma_jax.tasks.rendered import rendered

OPENERS = {
    "jsonl": "paligemma_jax.data.sources.jsonl:open_captions",
    "tfds": "paligemma_jax.data.sources.tfds_captions:open_captions",
}
"""Short names of `data.name` other than "scenes"; it may also be an import path of an opener (splits.py). Its records
have the caption as suffix."""


class ContrastiveData:
    """Opens the pairs of images and captions that a config's `data` names, as rows for one model."""

    def __init__(self, data: ConfigDict, tokenizer: TextTokenizer, preprocessing: Preprocessing, vision: ViTConfig):
        self._data, self._tokenizer, self._preprocessing, self._vision = data, tokenizer, preprocessing, vision

    def train(self) -> CaptionedScenes | CaptionedRecords:
        """Returns the training rows, each a function of its index."""
        data = self._data
        if data.name != "scenes":
            return self._records(self._source(data.split))
        folder = self._scenes("captions", data.num_scenes, data.num_objects)
        return CaptionedScenes(folder, self._tokenizer, data.views, data.noise, data.noise_share)

    def held_out(self) -> CaptionedScenes | CaptionedRecords:
        """Returns rows that are never trained on, with the first caption of each image."""
        data = self._data
        if data.name == "scenes":
            folder = self._scenes("captions-held-out", data.num_held_out, data.num_objects)
            return CaptionedScenes(folder, self._tokenizer)
        source = self._source(data.validation_split)
        _, first = np.unique(source.image_numbers(), return_index=True)
        return self._records(Subset(source, indices=np.sort(first)[: data.max_held_out]))

    def tuning(self) -> CaptionedScenes | None:
        """Returns rows to choose settings by, neither trained on nor held out; None if `data.num_tuning` is 0."""
        data = self._data
        if not data.num_tuning:
            return None
        return CaptionedScenes(self._scenes("captions-tuning", data.num_tuning, data.num_objects), self._tokenizer)

    def single_objects(self) -> CaptionedScenes | None:
        """Returns scenes of one object each for zero-shot classification; None for other data than scenes."""
        if self._data.name != "scenes":
            return None
        return CaptionedScenes(self._scenes("captions-single", self._data.num_held_out, (1, 1)), self._tokenizer)

    def _records(self, source: RecordSource) -> CaptionedRecords:
        return CaptionedRecords(
            source,
            self._tokenizer,
            self._preprocessing,
            on_error=self._data.on_error,
            max_bad_fraction=self._data.max_bad_fraction,
        )

    def _source(self, split: str) -> RecordSource:
        return open_source(self._data, split, common.progress, OPENERS)

    def _scenes(self, stream: str, number: int, num_objects: tuple[int, int]) -> Path:
        """Returns the folder of a stream's scenes, rendered on first use."""
        return rendered(self._data, stream, number, self._vision.image_size, self._vision.grid, num_objects)
