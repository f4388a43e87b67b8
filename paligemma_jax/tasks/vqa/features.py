"""Image features of a frozen tower, computed once per image: a bounded cache, and a store for training."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from cachetools import LRUCache
from jax.sharding import Mesh
from jaxtyping import Float

from paligemma_jax.data.records import BadRow, Record, RecordSource, Subset
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa.rows import RowProcessor
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError, cut
from train_jax.parallel import sharding

ENCODE_BATCH = 32  # images encoded at once at the start of a run; rounded up to the mesh
FEATURES = "features"  # key of a batch: the encoded image, in place of its pixels
Encode = Callable[[np.ndarray], np.ndarray]  # images uint8 [B, I, I, 3] -> features float32 [B, P, D]


@jax.jit
def encode_images(model: PaliGemma, images: jax.Array | np.ndarray) -> jax.Array:
    """Returns features float32 [B, P, D] of images uint8 [B, I, I, 3], normalized as the model's family does."""
    return model.encode_image(common.normalize(model, images))[0]


def batch_features(
    model: PaliGemma, batch: Mapping[str, jax.Array], keys: jax.Array | None = None
) -> Float[jax.Array, "B P D"]:
    """Returns the image features of a batch: those it has, or else those of its images.

    Args:
      model: with the tower.
      batch: with `features`, or with `image` uint8 [B, I, I, 3].
      keys: [B], for the tower's dropout; None: no dropout.
    """
    if FEATURES in batch:
        return batch[FEATURES]
    return model.encode_image(common.normalize(model, batch["image"]), keys)[0]


def encoder(model: PaliGemma, mesh: Mesh) -> Encode:
    """Returns `encode_images` on host arrays; every device encodes its share. The model is on the mesh."""

    def encode(images: np.ndarray) -> np.ndarray:
        return sharding.to_host(encode_images(model, common.to_mesh({"image": images}, mesh)["image"]))

    return encode


def feature_shape(model: PaliGemma) -> tuple[int, int]:
    """Returns the shape [P, D] of the features of one image."""
    return model.config.vision.num_patches, model.config.decoder.width


class FeatureCache:
    """Keeps the features of the images used last, at most `max_bytes` of them."""

    def __init__(self, encode: Encode, batch_size: int, max_bytes: int):
        """Creates an empty cache; `encode` is called with exactly `batch_size` images, so that it compiles once."""
        self._encode, self._batch_size = encode, batch_size
        self._features: LRUCache[int, np.ndarray] = LRUCache(max_bytes, getsizeof=lambda value: value.nbytes)

    def get(self, keys: list[int], fetch: Callable[[list[int]], list[np.ndarray]]) -> np.ndarray:
        """Returns features [len(keys), P, D] of the images with these keys; `fetch` reads the images not cached."""
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

    The features are exact while the tower is frozen. They take P x D x 4 bytes of host memory per image (41 KB for the
    tiny model, 2.1 MB for 3B at 224 pixels), and the same again in every worker process (`data.workers`); black images
    are stored once. All rows of an image that cannot be used are bad.
    """

    def __init__(
        self,
        source: RecordSource,
        processor: RowProcessor,
        model: PaliGemma,
        mesh: Mesh,
        limit_mb: int,
        progress: Callable,
    ):
        """Encodes the images of all rows.

        Args:
          source: the records.
          processor: prepares them.
          model: with the tower; on the mesh.
          mesh: of devices, which share the work.
          limit_mb: memory that the features may take, in MiB.
          progress: see tasks.common.progress.

        Raises:
          UserError: the features would take more memory (raised before any image is read), or a bad image where the
            config says that a bad row stops the run.
        """
        self._processor = processor
        numbers, first = np.unique(source.image_numbers(), return_index=True)
        distinct = 1 if processor.data.blank_images else len(numbers)
        shape = (distinct, *feature_shape(model))
        _check_size(4 * math.prod(shape), distinct, limit_mb)
        # The share of bad rows is checked in `_examples`: an image may have one question or many.
        images = processor.guarded(Subset(source, indices=first), processor.image, max_bad_fraction=1.0)
        encode, parts = encoder(model, mesh), sharding.row_divisor(mesh.shape)
        batch = -(-ENCODE_BATCH // parts) * parts
        self._features = np.empty(shape, np.float32)
        self._row_of_image: dict[int, int] = {}  # row of `_features`
        with progress(f"encoding {len(numbers)} training images") as on_progress:
            for start in range(0, len(numbers), batch):
                rows = [images[i] for i in range(start, min(start + batch, len(numbers)))]
                new = [row["image"] for row in rows[: max(distinct - start, 0)]]
                if new:
                    self._features[start : start + len(new)] = _encode_some(encode, new, batch)
                for i, row in enumerate(rows, start):
                    if row["weight"]:
                        self._row_of_image[int(numbers[i])] = min(i, distinct - 1)
                on_progress(start + len(rows), len(numbers))
        self._examples = processor.guarded(source, self._prepare)
        self.fingerprint = self._examples.fingerprint

    @property
    def bad_rows(self) -> dict[int, str]:
        """Names of the bad rows counted so far, see GuardedSource."""
        return self._examples.bad_rows

    def on_rows(self, indices: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> None:
        """Counts rows of a batch, see GuardedSource."""
        self._examples.on_rows(indices, bad)

    def check(self) -> None:
        """Checks the share of bad rows, see GuardedSource."""
        self._examples.check()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._examples[index]

    def _prepare(self, record: Record) -> dict[str, np.ndarray]:
        row = self._row_of_image.get(record.image_index)
        if row is None and record.weight:
            raise BadRow(f"the image {cut(record.image_name)} cannot be used; replace the file.")
        return self._processor.text(record) | {FEATURES: self._features[row or 0]}


def _check_size(size: int, images: int, limit_mb: int) -> None:
    if size > limit_mb << 20:
        raise UserError(
            f"cache_features needs {-(-size >> 20):,} MiB of host memory for {images:,} images, expected at most "
            f"cache_features_mb={limit_mb}: raise it, or set cache_features=False."
        )


def _encode_some(encode: Encode, images: list[np.ndarray], size: int) -> np.ndarray:
    """Returns features of up to `size` images; `encode` gets exactly `size`, padded with copies of the first."""
    return encode(np.stack(images + images[:1] * (size - len(images))))[: len(images)]
