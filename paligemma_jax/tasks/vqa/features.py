"""Image features of a frozen tower, computed once per image: a store for training, a cached reader for evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from cachetools import LRUCache
from jax.sharding import Mesh
from jaxtyping import Float

from paligemma_jax.data.records import BadRow, Record, RecordSource, Subset, blank_record
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
    """Returns a batch's image features, encoding its images if it has none.

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


class QuestionReader:
    """Reads rows of a source as prompts, targets and image features; bad rows have weight 0.

    It is a context manager that ends its threads.
    """

    def __init__(
        self, processor: RowProcessor, source: RecordSource, encode: Encode, size: int, cache_bytes: int, shuffled: bool
    ):
        """Starts the threads; nothing is read yet.

        Args:
          processor: prepares the records.
          source: the records.
          encode: returns the features of images.
          size: number of images encoded at once.
          cache_bytes: bytes of features to keep.
          shuffled: show each question the image of another scene (the same one for all questions of an image).
        """
        self._processor = processor
        self._rows = processor.guarded(source, self._prepare)
        # The share of bad rows is checked in `_rows`: an image may have one question or many.
        self._images = processor.guarded(source, processor.image, max_bad_fraction=1.0)
        self._numbers = np.asarray(source.image_numbers())
        unique, first = np.unique(self._numbers, return_index=True)
        self._row_of_image = dict(zip(unique.tolist(), first.tolist(), strict=True))
        self._shown = other_images(unique) if shuffled else {number: number for number in self._row_of_image}
        self._unusable: set[int] = set()
        self._encode, self._cache_bytes, self._pool = encode, cache_bytes, ThreadPoolExecutor(2)
        self._cache = FeatureCache(encode, size, cache_bytes)

    def __enter__(self) -> "QuestionReader":
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown(wait=False)

    def resize(self, size: int) -> None:
        """Changes the number of images encoded at once; empties the cache."""
        self._cache = FeatureCache(self._encode, size, self._cache_bytes)

    def check(self) -> None:
        """Raises UserError where too many rows were bad."""
        self._rows.check()

    def blank(self) -> dict[str, np.ndarray]:
        """Returns the arrays of an empty row, `image` among them."""
        record = blank_record()
        example = self._prepare(record) | self._processor.image(record) | {"weight": np.asarray(0, np.float32)}
        return {name: value for name, value in example.items() if name != "record"}

    def _prepare(self, record: Record) -> dict[str, Any]:
        if record.weight and self._shown[record.image_index] in self._unusable:
            raise BadRow(f"the image for {cut(record.image_name)} cannot be used; replace the file.")
        return {"record": record} | self._processor.prompt_and_text(record)

    def read(self, rows: range, size: int) -> tuple[list[Record], dict[str, np.ndarray]]:
        """Returns the records of some rows and their arrays [size, ...], padded with copies of weight 0."""
        images = [self._shown[int(self._numbers[i])] for i in rows]
        features = self._cache.get(images, self._fetch)
        examples = [self._rows[i] for i in rows]  # after the images, as rows whose image cannot be used are bad
        records = [example.pop("record") for example in examples]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        self._rows.on_rows(rows, batch.pop("bad"))
        batch["features"] = features
        padding = size - len(rows)
        batch = {name: np.concatenate([array, np.repeat(array[:1], padding, 0)]) for name, array in batch.items()}
        batch["weight"][len(rows) :] = 0
        return records, batch

    def _fetch(self, numbers: list[int]) -> list[np.ndarray]:
        """Decodes the images with these numbers in threads."""
        rows = list(self._pool.map(lambda number: self._images[self._row_of_image[number]], numbers))
        self._unusable |= {number for number, row in zip(numbers, rows, strict=True) if row["weight"] == 0}
        return [row["image"] for row in rows]


def other_images(numbers: np.ndarray) -> dict[int, int]:
    """Maps each of two or more different images to another one: a random cycle, so that none is mapped to itself."""
    order = numbers[np.argsort(np.random.PCG64(0).random_raw(len(numbers)), kind="stable")]
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
