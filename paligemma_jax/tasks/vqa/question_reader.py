"""Reads the batches of an evaluation: prompts, targets and image features of questions."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from paligemma_jax.data.records import BadRow, Record, RecordSource, blank_record
from paligemma_jax.tasks.vqa.features import Encode, FeatureCache
from paligemma_jax.tasks.vqa.rows import RowProcessor
from train_jax.core.errors import cut


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
