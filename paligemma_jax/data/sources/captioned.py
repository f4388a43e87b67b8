"""Images with captions, as rows for contrastive training. Axes: I pixels a side, L tokens of a text, P D features."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.records import BadRow, GuardedSource, Record, RecordSource
from paligemma_jax.data.synthetic_clevr.captions import caption
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.data_source import DataSource
from train_jax.core.errors import cut

_CAPTION_SEED, _NOISE_SEED = zlib.crc32(b"captions"), zlib.crc32(b"spoilt")
NOISE = ("images", "texts", "pairs")
NOISE_IMAGES = 32  # distinct images of noise
FEATURES = "features"  # key of a row: the image as encoded by the tower, instead of its pixels


class CaptionedScenes(DataSource):
    """Synthetic scenes built by `pretraining_scenes.build`; row i is caption i // n of scene i % n of n scenes.

    Captions are not stored: each is a function of its row, and a scene has `views` different ones.

    Args:
      folder: of the scenes.
      tokenizer: of the captions.
      views: captions of a scene before they repeat.
      noise: what is replaced in noisy rows (as in Zhai et al. 2023): "images", by independent random pixels; "texts",
        by equally many random tokens; "pairs", the caption by that of another row.
      share: of noisy rows, 0 to 1; whether a row is noisy is a function of its index.
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, views: int = 1, noise: str = "", share: float = 0.0):
        self.folder = folder
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self.scenes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
        self._tokenizer, self._views, self._noise, self._share = tokenizer, views, noise, share

    def __len__(self) -> int:
        return len(self.scenes) * self._views

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns uint8 image [I, I, 3], tokens [L] and their mask, `text_id` and `image_id` (equal for equal ones)."""
        return {"image": self.read_image(self.image_number(index))} | self.texts(index)

    def texts(self, index: int) -> dict[str, Any]:
        """Returns a row without its image."""
        row = text_row(self._tokenizer, self.text(index))
        row["image_id"] = np.int32(self.image_number(index))
        if rng := self._noise_rng("texts", index):
            is_word = ~np.isin(row["tokens"], (self._tokenizer.pad_id, self._tokenizer.eos_id))
            row["tokens"][is_word] = rng.integers(self._tokenizer.vocab_size, size=is_word.sum())
            row["text_id"] = text_id(row["tokens"].tobytes())
        return row

    def text(self, index: int) -> str:
        """Returns the caption of a row."""
        if rng := self._noise_rng("pairs", index):
            index = int(rng.integers(len(self)))
        rng = np.random.Generator(np.random.PCG64((_CAPTION_SEED, index)))
        return caption(self.scenes[index % len(self.scenes)], rng)

    @property
    def num_images(self) -> int:
        """Number of distinct images of the rows: first the images of scenes, then the noise images."""
        return len(self.scenes) + NOISE_IMAGES * (self._noise == "images")

    def image_number(self, index: int) -> int:
        """Returns the number of the image of a row, below `num_images`."""
        if rng := self._noise_rng("images", index):
            return len(self.scenes) + int(rng.integers(NOISE_IMAGES))
        return index % len(self.scenes)

    def read_image(self, number: int) -> np.ndarray:
        """Returns an image by its number, uint8 [I, I, 3]."""
        if number < len(self.scenes):
            return np.array(self._images[number])
        rng = np.random.Generator(np.random.PCG64((_NOISE_SEED, number)))
        return rng.integers(256, size=self._images.shape[1:], dtype=np.uint8)

    def image(self, index: int) -> np.ndarray:
        """Returns the image of a row."""
        return self.read_image(self.image_number(index))

    def _noise_rng(self, part: str, index: int) -> np.random.Generator | None:
        """Returns the random generator that replaces this part of a row, None if it is not replaced."""
        if part != self._noise:
            return None
        rng = np.random.Generator(np.random.PCG64((_NOISE_SEED, NOISE.index(part), index)))
        return rng if rng.random() < self._share else None


class CaptionedFeatures(DataSource):
    """Rows of captioned scenes with `features` [P, D] in place of the image; `features` holds them by image number."""

    def __init__(self, scenes: CaptionedScenes, features: np.ndarray):
        self._scenes, self._features = scenes, features

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {FEATURES: self._features[self._scenes.image_number(index)]} | self._scenes.texts(index)


def encode_scenes(
    scenes: CaptionedScenes,
    encode: Callable[[np.ndarray], np.ndarray],
    on_progress: Callable[[int, int], object],
    batch_size: int = 64,
) -> np.ndarray:
    """Returns the features [N, P, D] of all N distinct images.

    Args:
      scenes: whose `num_images` is N.
      encode: encodes exactly `batch_size` images uint8 [B, I, I, 3].
      on_progress: called with the number of images done and the total.
      batch_size: images encoded at a time.
    """
    total, parts = scenes.num_images, []
    for start in range(0, total, batch_size):
        numbers = [min(index, total - 1) for index in range(start, start + batch_size)]
        parts.append(encode(np.stack([scenes.read_image(number) for number in numbers])))
        on_progress(min(start + batch_size, total), total)
    return np.concatenate(parts)[:total]


class CaptionedRecords(GuardedSource):
    """Rows of a source whose records have an image, and a caption as their suffix; bad rows have weight 0."""

    def __init__(
        self,
        source: RecordSource,
        tokenizer: TextTokenizer,
        preprocessing: Preprocessing,
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        def prepare(record: Record) -> dict[str, Any]:
            try:
                image = preprocessing.resize(preprocessing.decode(record.image))
            except BadRow as error:
                raise BadRow(f"{cut(record.image_name)}: {error}") from error
            return {"image": image} | text_row(tokenizer, record.suffix) | {"image_id": np.int32(record.image_index)}

        super().__init__(source, prepare, on_error=on_error, max_bad_fraction=max_bad_fraction)

    def text(self, index: int) -> str:
        """Returns the caption of a row."""
        return self.source.suffix(index)

    def image(self, index: int) -> np.ndarray:
        """Returns the image of a row as the model gets it, uint8 [I, I, 3]."""
        return self[index]["image"]


def text_row(tokenizer: TextTokenizer, text: str) -> dict[str, Any]:
    """Returns the tokens [L] of a caption, their mask, and `text_id`."""
    (tokens,), (mask,) = tokenizer([text])
    return {"tokens": tokens, "mask": mask, "text_id": text_id(text.encode())}


def text_id(text: bytes) -> np.int32:
    """Returns a number that is equal for equal texts and hardly ever for others."""
    return np.uint32(zlib.crc32(text)).view(np.int32)
