"""Image features of a frozen tower, computed once an image and reused: a bounded cache, and a store for training."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from cachetools import LRUCache
from jax.sharding import Mesh

from paligemma_jax.data.records import BadRow, Record, Source, Subset
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa.rows import Rows
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError, cut
from train_jax.parallel import sharding

ENCODED_AT_ONCE = 32  # images, when a run begins; rounded up to the mesh
FEATURES = "features"  # of a batch: the image as the tower encoded it, instead of its pixels
Encode = Callable[[np.ndarray], np.ndarray]  # images uint8 [B, I, I, 3] -> features float32 [B, P, D]


@jax.jit
def encode_images(model: PaliGemma, images: jax.Array | np.ndarray) -> jax.Array:
    """Features float32 [B, P, D] of images uint8 [B, I, I, 3], in the value range of the model's family."""
    return model.encode_image(model.config.preprocessing.normalize(images))[0]


def encoder(model: PaliGemma, mesh: Mesh) -> Encode:
    """`encode_images` from host to host, every device with its share of the images; the model lies on the mesh."""

    def encode(images: np.ndarray) -> np.ndarray:
        return sharding.to_host(encode_images(model, common.to_mesh({"image": images}, mesh)["image"]))

    return encode


def feature_shape(model: PaliGemma) -> tuple[int, int]:
    """P, D: the features of one image, float32."""
    return model.config.vision.num_patches, model.config.decoder.width


class FeatureCache:
    """Features of the images met last, at most `max_bytes` of them; memory does not grow with the data."""

    def __init__(self, encode: Encode, batch_size: int, max_bytes: int):
        """`encode` is called with exactly `batch_size` images, so that it compiles once."""
        self._encode, self._batch_size = encode, batch_size
        self._features: LRUCache[int, np.ndarray] = LRUCache(max_bytes, getsizeof=lambda value: value.nbytes)

    def get(self, keys: list[int], fetch: Callable[[list[int]], list[np.ndarray]]) -> np.ndarray:
        """Features [len(keys), P, D] of the images with these keys; `fetch` reads those not held."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._features]
        fresh: dict[int, np.ndarray] = {}
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            fresh |= zip(part, _encode_some(self._encode, fetch(part), self._batch_size), strict=True)
        out = np.stack([fresh[key] if key in fresh else self._features[key] for key in keys])
        for key, value in fresh.items():
            if value.nbytes <= self._features.maxsize:
                self._features[key] = value.copy()  # not a view, which would keep the whole batch alive
        return out


class FeatureStore(DataSource):
    """Training rows with `features` [P, D] in place of `image`; every image is encoded once, at the start.

    Exact while the tower is frozen. Takes P x D x 4 bytes an image of host memory (41 KB for the tiny model, 2.1 MB for
    3B at 224 pixels), and that again in every worker process (`data.workers`); black images take those of one. All rows
    of an image that cannot be used are bad.
    """

    def __init__(self, source: Source, rows: Rows, model: PaliGemma, mesh: Mesh, limit_mb: int, progress):
        """Encodes the images of all rows.

        Args:
          source: the records.
          rows: prepares them.
          model: holds the tower; lies on the mesh.
          mesh: shares the work.
          limit_mb: MiB that the features may take.
          progress: see tasks.common.progress.

        Raises:
          UserError: they would take more, told before any image is read; an image that is bad, where the config says
            that one stops the run.
        """
        self._rows = rows
        numbers, first = np.unique(source.image_numbers(), return_index=True)
        distinct = 1 if rows.data.blank_images else len(numbers)
        shape = (distinct, *feature_shape(model))
        _check_size(4 * math.prod(shape), distinct, limit_mb)
        # Shares are judged by row, in `_examples`: an image may have one question or many.
        images = rows.guarded(Subset(source, indices=first), rows.image, max_bad_fraction=1.0)
        encode, parts = encoder(model, mesh), common.row_parts(mesh)
        batch = -(-ENCODED_AT_ONCE // parts) * parts
        self._features, self._place = np.empty(shape, np.float32), {}
        with progress(f"encoding {len(numbers)} training images") as told:
            for start in range(0, len(numbers), batch):
                read = [images[i] for i in range(start, min(start + batch, len(numbers)))]
                new = [row["image"] for row in read[: max(distinct - start, 0)]]
                if new:
                    self._features[start : start + len(new)] = _encode_some(encode, new, batch)
                for i, row in enumerate(read, start):
                    if row["weight"]:
                        self._place[int(numbers[i])] = min(i, distinct - 1)
                told(start + len(read), len(numbers))
        self._examples = rows.guarded(source, self._prepare)
        self.fingerprint = self._examples.fingerprint

    @property
    def bad_rows(self) -> dict[int, str]:
        """See GuardedSource."""
        return self._examples.bad_rows

    def on_rows(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows that were read, see GuardedSource."""
        self._examples.on_rows(indices, bad)

    def check(self) -> None:
        """Judges the share of bad rows, see GuardedSource."""
        self._examples.check()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._examples[index]

    def _prepare(self, record: Record) -> dict[str, np.ndarray]:
        place = self._place.get(record.image_index)
        if place is None and record.weight:
            raise BadRow(f"the image {cut(record.image_name)} cannot be used; replace the file.")
        return self._rows.text(record) | {"features": self._features[place or 0]}


def _check_size(size: int, images: int, limit_mb: int) -> None:
    if size > limit_mb << 20:
        raise UserError(
            f"cache_features needs {-(-size >> 20):,} MiB of host memory for {images:,} images, expected at most "
            f"cache_features_mb={limit_mb}: raise it, or set cache_features=False."
        )


def _encode_some(encode: Encode, images: list[np.ndarray], size: int) -> np.ndarray:
    """Features of up to `size` images; `encode` is given exactly that many, filled up with copies of the first."""
    return encode(np.stack(images + images[:1] * (size - len(images))))[: len(images)]
