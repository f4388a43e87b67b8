"""Rows of a few-shot data set: for tuning, with two random views of each image, and for testing. I pixels a side."""

import hashlib
import zlib
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from paligemma_jax.data.few_shot.dataset import FewShot
from paligemma_jax.data.few_shot.descriptions import uniform_of_step
from paligemma_jax.data.records import BadRow, GuardedSource, Record, RecordSource, checked_index, fingerprint_of
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core import digests
from train_jax.core.data_source import DataSource, stack
from train_jax.core.errors import cut

_VIEWS = zlib.crc32(b"views")


class FewShotRecords(RecordSource):
    """The examples of one split as records: the suffix is the class name, the image number the row number."""

    def __init__(self, data: FewShot, split: str):
        self.labels = np.array([label for _, label in data.splits[split]], np.int32)
        self._images, self._classes, self._root = [image for image, _ in data.splits[split]], data.classes, data.root
        self._identity = data.digest, split

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, for which their images are read once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        images = digests.of_files([self._root / name for name in self._images], what="images").tobytes()
        data, split = self._identity
        return fingerprint_of(kind="few_shot", data=data, split=split, images=hashlib.sha256(images).hexdigest())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = self._images[index]
        try:
            image = (self._root / name).read_bytes()
        except OSError as error:
            raise BadRow(f"cannot read {cut(name)} ({error.strerror}), expected an image file: add it.") from error
        return Record(image, name, index, "", self._classes[self.labels[index]])

    def image_numbers(self) -> np.ndarray:
        """Returns the row numbers."""
        return np.arange(len(self))


class LabelledRows(GuardedSource):
    """Rows {image uint8 [I, I, 3], label int32, weight, bad} of one split, for testing.

    Images are resized by the model's preprocessing. Bad rows have weight 0; see `GuardedSource` for this, the keyword
    arguments and the errors.
    """

    def __init__(
        self,
        data: FewShot,
        preprocessing: Preprocessing,
        split: str = "test",
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        records = FewShotRecords(data, split)

        def prepare(record: Record) -> dict[str, np.ndarray]:
            image = preprocessing.resize(_decoded(record, preprocessing))
            return {"image": image, "label": records.labels[record.image_index]}

        super().__init__(records, prepare, on_error=on_error, max_bad_fraction=max_bad_fraction)


class TunedRows(DataSource):
    """Rows {image, image_augmented uint8 [I, I, 3], label int32, weight, bad, draw} of the training split.

    `image` is a view for the tuned branch, `image_augmented` another view of the same image for the frozen branch;
    `draw`, the same in all rows of a step, selects the sentences (`descriptions.positions`). All are functions of the
    seed, the step and the row, not of the process or thread, so a resumed run sees the same views; a row that is in a
    step twice has the same views twice.

    Args:
      data: its training images.
      preprocessing: of the model.
      tuned, frozen: augmentations of the two branches.
      seed: of views and draws.
      on_error, max_bad_fraction: see `GuardedSource`, as for the errors.
    """

    def __init__(
        self,
        data: FewShot,
        preprocessing: Preprocessing,
        tuned: Augmentation,
        frozen: Augmentation,
        seed: int,
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        records = FewShotRecords(data, "train")

        def prepare(record: Record) -> dict[str, np.ndarray]:
            return {"image": _decoded(record, preprocessing), "label": records.labels[record.image_index]}

        self._images = GuardedSource(records, prepare, on_error=on_error, max_bad_fraction=max_bad_fraction)
        self._preprocessing, self._seed = preprocessing, seed
        self._views = {"image": tuned, "image_augmented": frozen}
        views = {"tuned": vars(tuned), "frozen": vars(frozen)}
        settings = views | {"preprocessing": preprocessing.to_dict(), "seed": seed}
        self.fingerprint = fingerprint_of(records=records.fingerprint, **settings)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.get_batch(np.array([index]), 0).items()}

    def get_batch(
        self, indices: Int[np.ndarray, " n"], step: int, rows: Int[np.ndarray, " n"] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the examples of a step, see DataSource; the row numbers within the batch do not matter."""
        batch = stack([self._row(int(index), step) for index in indices])
        return batch | {"draw": np.full(len(indices), uniform_of_step(self._seed, step))}

    @property
    def bad_rows(self) -> dict[int, str]:
        """Names of bad rows, see GuardedSource."""
        return self._images.bad_rows

    def on_rows(self, indices: Int[np.ndarray, " n"], bad: Bool[np.ndarray, " n"]) -> None:
        """Counts rows that were read, see GuardedSource."""
        self._images.on_rows(indices, bad)

    def check(self) -> None:
        """Checks the share of bad rows, see GuardedSource."""
        self._images.check()

    def _row(self, index: int, step: int) -> dict[str, np.ndarray]:
        row = self._images[index]
        views = {}
        for number, (name, augmentation) in enumerate(self._views.items()):
            rng = np.random.Generator(np.random.PCG64((self._seed, _VIEWS, number, step, index)))
            views[name] = augmentation.view(row["image"], self._preprocessing, rng)
        return row | views


def _decoded(record: Record, preprocessing: Preprocessing) -> np.ndarray:
    try:
        return preprocessing.decode(record.image)
    except BadRow as error:
        raise BadRow(f"{cut(record.image_name)}: {error}") from error
