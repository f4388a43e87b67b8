"""Image features of a frozen tower, computed once an image and reused: a bounded cache, and a store for training."""

from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np

from paligemma_jax.data.records import BadRow, GuardedSource, Record, Source, Subset
from paligemma_jax.models.paligemma import PaliGemma

Encode = Callable[[np.ndarray], jax.Array | np.ndarray]  # images uint8 [B, I, I, 3] -> features float32 [B, P, D]


@jax.jit
def encode_images(model: PaliGemma, images: jax.Array | np.ndarray) -> jax.Array:
    """Features float32 [B, P, D] of images uint8 [B, I, I, 3], in the value range of the model's family."""
    return model.encode_image(model.config.preprocessing.normalize(images))[0]


class FeatureCache:
    """Features of the images met last, at most `max_bytes` of them; memory does not grow with the data."""

    def __init__(self, encode: Encode, batch_size: int, max_bytes: int):
        """`encode` is called with exactly `batch_size` images, so that it compiles once."""
        self._encode, self._batch_size, self._max_bytes = encode, batch_size, max_bytes
        self._features: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def get(self, keys: list[int], fetch: Callable[[list[int]], list[np.ndarray]]) -> np.ndarray:
        """Features [len(keys), P, D] of the images with these keys; `fetch` reads those not held."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._features]
        fresh: dict[int, np.ndarray] = {}
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            encoded = np.asarray(self._encode(_stack(fetch(part), self._batch_size)))
            fresh |= zip(part, encoded[: len(part)], strict=True)
        out = np.stack([fresh[key] if key in fresh else self._touch(key) for key in keys])
        for key, value in fresh.items():
            self._features[key] = value.copy()  # not a view, which would keep the whole batch alive
            self._bytes += value.nbytes
        while self._bytes > self._max_bytes and self._features:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
        return out

    def _touch(self, key: int) -> np.ndarray:
        self._features.move_to_end(key)
        return self._features[key]


class FeatureStore:
    """Training rows with `features` [P, D] in place of `image`; every image is encoded once, at the start.

    Exact while the tower is frozen. Takes P x D x 4 bytes an image of host memory (41 KB for the tiny model). All rows
    of an image that cannot be used are bad.
    """

    BATCH = 32

    def __init__(
        self,
        source: Source,
        guard: Callable[..., GuardedSource],
        prepare_text: Callable[[Record], dict],
        prepare_image: Callable[[Record], dict],
        encode: Encode,
        progress,
    ):
        """Encodes the images of all rows.

        Args:
          source: the records.
          guard: makes a GuardedSource of a source and what prepares its records (and `max_bad_fraction`).
          prepare_text, prepare_image: what a row holds beside its features; its `image`.
          encode: the tower.
          progress: see tasks.common.progress.
        """
        self._prepare_text = prepare_text
        numbers, first = np.unique(source.image_numbers(), return_index=True)
        # Shares are judged by row, in `_rows`: an image may have one question or many.
        images = guard(Subset(source, indices=first), prepare_image, max_bad_fraction=1.0)
        self._features, self._place = None, {}
        with progress(f"encoding {len(numbers)} training images") as told:
            for start in range(0, len(numbers), self.BATCH):
                rows = [images[i] for i in range(start, min(start + self.BATCH, len(numbers)))]
                encoded = np.asarray(encode(_stack([row["image"] for row in rows], self.BATCH)))
                if self._features is None:
                    self._features = np.empty((len(numbers), *encoded.shape[1:]), encoded.dtype)
                self._features[start : start + len(rows)] = encoded[: len(rows)]
                self._place |= {int(numbers[start + i]): start + i for i, row in enumerate(rows) if row["weight"]}
                told(start + len(rows), len(numbers))
        self._rows = guard(source, self._prepare)
        self.fingerprint = self._rows.fingerprint

    @property
    def bad_rows(self) -> dict[int, str]:
        """See GuardedSource."""
        return self._rows.bad_rows

    def check(self) -> None:
        """Judges the share of bad rows, see GuardedSource."""
        self._rows.check()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._rows[index]

    def _prepare(self, record: Record) -> dict[str, np.ndarray]:
        place = self._place.get(record.image_index)
        if place is None and record.weight:
            raise BadRow(f"the image {record.image_name} cannot be used; replace the file.")
        return self._prepare_text(record) | {"features": self._features[place or 0]}


def _stack(images: list[np.ndarray], size: int) -> np.ndarray:
    """`size` images: those given, and copies of the first."""
    return np.stack(images + images[:1] * (size - len(images)))
