"""Image features of a frozen tower, computed once an image and reused: a bounded cache, and a store for training."""

from collections import OrderedDict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Encode = Callable[..., jax.Array]  # images uint8 [B, I, I, 3] -> features [B, P, D]


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
            images = fetch(part)
            images += [images[0]] * (self._batch_size - len(part))
            fresh |= zip(part, np.asarray(self._encode(np.stack(images))), strict=False)
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

    Exact while the tower is frozen. Takes P x D x 4 bytes an image of host memory (41 KB for the tiny model).
    """

    BATCH = 32

    def __init__(self, texts, images, encode: Encode, progress):
        """Encodes the images of all rows.

        Args:
          texts, images: guarded sources of the same records, one without and one with the `image`.
          encode: the tower.
          progress: see tasks.common.progress.
        """
        self._texts, self._images = texts, images
        self.fingerprint = texts.fingerprint
        unique, first, self._place = np.unique(texts.source.image_numbers(), return_index=True, return_inverse=True)
        self._usable = np.ones(len(unique), np.float32)
        encode, parts = jax.jit(encode), []
        with progress(f"encoding {len(unique)} training images") as told:
            for start in range(0, len(unique), self.BATCH):
                rows = [images[int(i)] for i in first[start : start + self.BATCH]]
                self._usable[start : start + len(rows)] = [row["weight"] for row in rows]
                pixels = np.stack([row["image"] for row in rows + rows[:1] * (self.BATCH - len(rows))])
                parts.append(np.asarray(encode(jnp.asarray(pixels)))[: len(rows)])
                told(start + len(rows), len(unique))
        self._features = np.concatenate(parts)

    @property
    def bad_rows(self) -> dict[int, str]:
        return self._texts.bad_rows | self._images.bad_rows

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row, place = self._texts[index], self._place[index]
        return row | {"features": self._features[place], "weight": row["weight"] * self._usable[place]}
