"""Captions of synthetic scenes as evaluation rows, one per scene, in the style of the tiny base's pretraining."""

import dataclasses
import re

import numpy as np

from paligemma_jax.data.records import Record, RecordSource, Subset, fingerprint_of
from paligemma_jax.data.synthetic_clevr.build import VERSION, split_scene
from paligemma_jax.data.synthetic_clevr.pretraining_texts import plain_caption

_NAME = re.compile(r"CLEVR_(\w+)_(\d+)\.png")


class SceneCaptions(RecordSource):
    """The first scenes of a source of questions about synthetic scenes, each with its caption instead of questions.

    Args:
      source: questions; images are named as `synthetic_clevr.build` names them.
      scene_seed: seed of the source's scenes.
      count: largest number of scenes.
    """

    def __init__(self, source: RecordSource, scene_seed: int, count: int):
        first = np.unique(source.image_numbers(), return_index=True)[1]
        self._rows, self._seed = Subset(source, indices=first[:count]), scene_seed
        self.fingerprint = fingerprint_of(kind="captions", version=VERSION, rows=self._rows.fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        record = self._rows[index]
        match = _NAME.fullmatch(record.image_name)
        if match is None:
            raise ValueError(f"{record.image_name} is no image of a synthetic scene.")
        split, number = match.groups()
        prefix, suffix = plain_caption(split_scene(self._seed, split, int(number)))
        return dataclasses.replace(record, prefix=prefix, suffix=suffix)

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row."""
        return self._rows.image_numbers()
