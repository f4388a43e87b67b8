"""Synthetic image data on disk: folders of files, and a data set as prepared by TFDS."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

features = tfds.features


def pixels(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, classes: int = 3, each: int = 10, broken: tuple[str, ...] = ()) -> Path:
    """Writes class folders "a", "b", ... of random images; image n of class c is pixels(100 c + n)."""
    for label in range(classes):
        folder = root / "abc"[label]
        folder.mkdir(parents=True)
        for number in range(each):
            (folder / f"{number:02}.png").write_bytes(encoded(pixels(100 * label + number)))
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Labelled images, in colour or grey: image n has the key n, the pixels pixels(n) and the label n % 2."""

    name = "pictures"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def __init__(self, *, channels: int, **kwargs):
        self.channels = channels
        super().__init__(**kwargs)

    def _info(self):
        image = features.Image(shape=(8, 8, self.channels), encoding_format="png")
        columns = {"image": image, "label": features.ClassLabel(num_classes=2), "number": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(columns))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(range(20)), "test": self._generate_examples(range(100, 110))}

    def _generate_examples(self, numbers):
        for number in numbers:
            image = pixels(number)[..., 0] if self.channels == 1 else pixels(number)
            yield number, {"image": encoded(image), "label": number % 2, "number": number}


def prepare(root: Path, channels: int = 3) -> Path:
    """The version folder."""
    builder = Pictures(channels=channels, data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return root / "pictures/1.0.0"


def colours(images: np.ndarray) -> np.ndarray:
    """Returns features: the mean colour and its square."""
    means = images.astype(np.float64).mean(axis=(1, 2))
    return np.concatenate([means, means**2 / 255], axis=1)


def flat(images: np.ndarray) -> np.ndarray:
    """Returns invalid features: one number for all images."""
    return images.mean()
