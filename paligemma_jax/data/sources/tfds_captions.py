"""Images with captions from a data set prepared by TFDS, such as coco_captions."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from paligemma_jax.data.records import BadRow, Record, RecordSource, checked_index, fingerprint_of
from paligemma_jax.data.row_texts import check_texts
from train_jax.core import digests
from train_jax.core.errors import UserError
from train_jax.core.formats.tfds import open_builder, open_split


class TfdsCaptions(RecordSource):
    """Image and caption pairs; row i is a caption of example i % n of n examples, its captions in turn by i // n.

    Args:
      folder: the version folder, with dataset_info.json; its files must be array_record.
      split: one of its splits.
      image: name of the feature with the image.
      caption: name of the feature with the text or texts; parts of nested features are joined by a slash, as in
        "captions/text".
      views: rows per example, usually its number of captions.
      cache: folder that stores digests of the images, by which equal ones share an index; None computes them every
        time.

    Raises:
      UserError: no such folder, split or feature, or files without random access.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        image: str = "image",
        caption: str = "caption",
        views: int = 1,
        cache: str | Path | None = None,
    ):
        self._folder = Path(folder).expanduser()
        builder = open_builder(self._folder)
        for name in (image, caption):
            _check_feature(builder.info.features, name, self._folder)
        self._examples = open_split(builder, self._folder, split, image)
        self._image, self._caption, self._views, self._split = image, caption.split("/"), views, split
        info = builder.info
        cache_file = digests.cache_file_of(cache, "tfds", str(self._folder.resolve()), split, image)
        files = sorted(self._folder.glob("*.array_record*"))
        images = digests.kept(cache_file, files, self._digests)["images"]
        self._numbers = digests.numbers(digests.keys(images))
        self.fingerprint = fingerprint_of(
            kind="tfds",
            name=info.full_name,
            split=split,
            shards=list(info.splits[split].shard_lengths),
            bytes=info.splits[split].num_bytes,
            images=hashlib.sha256(images.tobytes()).hexdigest(),
            features=(image, caption),
            views=views,
        )

    def __len__(self) -> int:
        return len(self._examples) * self._views

    def __getitem__(self, index: int) -> Record:
        view, row = divmod(checked_index(index, len(self)), len(self._examples))
        name, example = f"{self._split} example {row}", self._example(row)
        texts: Any = example
        for part in self._caption:
            texts = texts[part]
        texts = list(texts) if isinstance(texts, list | tuple | np.ndarray) else [texts]
        if not texts:
            raise BadRow(f"{name} of {self._folder} has no caption: leave it out.")
        caption = {"caption": texts[view % len(texts)]}
        (text,) = check_texts(caption, ("caption",), f"{name} of {self._folder}", "leave it out")
        return Record(example[self._image], name, int(self._numbers[row]), "", text)

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, without reading any row."""
        return np.tile(self._numbers, self._views)

    def _example(self, row: int) -> dict[str, Any]:
        try:
            return self._examples[row]
        except (RuntimeError, ValueError) as error:  # array_record's checksums, or a record that does not parse
            raise BadRow(
                f"{self._split} example {row} of {self._folder} cannot be read ({error}): prepare the data again."
            ) from error

    def _digests(self) -> dict[str, np.ndarray]:
        """Returns `images`, the digest of every example's image, zeros if it cannot be read."""
        images, rows = [], tqdm(range(len(self._examples)), "Reading images", disable=not sys.stderr.isatty())
        for row in rows:
            try:
                images.append(digests.digest(self._example(row)[self._image]))
            except BadRow:
                images.append(digests.digest(None))
        return {"images": digests.stacked(images)}


def _check_feature(features: Any, name: str, folder: Path) -> None:
    """Refuses a feature name, of nested features too, that the data set does not have."""
    for part in name.split("/"):
        inner = getattr(features, "feature", features)  # the features of a sequence
        if part not in inner:
            raise UserError(
                f"{folder} has no feature {name!r}, expected some of {', '.join(sorted(inner))}: change data.caption "
                "or data.image."
            )
        features = inner[part]


def open_captions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> TfdsCaptions:
    """Opens the captions of a contrastive run; see splits.open_source."""
    del progress
    return TfdsCaptions(data.source, split, data.image, data.caption, data.views, data.cache_dir)
