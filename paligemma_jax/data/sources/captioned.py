"""Pictures with captions: rows for contrastive training. Axes: I pixels a side, L tokens of a text, P D of features."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paligemma_jax.data.records import BadRow, GuardedSource, Record, Source, suffix_of
from paligemma_jax.data.synthetic_clevr.captions import caption
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.data_source import DataSource
from train_jax.core.errors import cut

CAPTIONS, SPOILT = zlib.crc32(b"captions"), zlib.crc32(b"spoilt")
NOISE = ("images", "texts", "pairs")
NOISE_PICTURES = 32
FEATURES = "features"  # of a row: the picture as the tower encoded it, instead of its pixels


class CaptionedScenes(DataSource):
    """Synthetic scenes that `pretraining_scenes.build` has made; row i is caption i // n of scene i % n of n scenes.

    Captions are not stored: each is a function of its row, and a scene comes with another one every time (`views`).

    Args:
      folder: of the scenes.
      tokenizer: of the captions.
      views: captions of a scene before they repeat.
      noise: what is spoilt in a row (as in Zhai et al. 2023): "images", noise of independent pixels instead of
        the picture; "texts", words drawn at random, as many as there were; "pairs", the caption of another row.
      share: of how many rows; which ones is a function of the row.
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, views: int = 1, noise: str = "", share: float = 0.0):
        self.folder = folder
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self.scenes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
        self._tokenizer, self._views, self._noise, self._share = tokenizer, views, noise, share

    def __len__(self) -> int:
        return len(self.scenes) * self._views

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """uint8 image [I, I, 3], tokens [L] and their mask; `text_id` and `image_id`, equal for equal ones."""
        return {"image": self.picture(self.number(index))} | self.texts(index)

    def texts(self, index: int) -> dict[str, np.ndarray]:
        """A row without its picture."""
        row = text_row(self._tokenizer, self.text(index)) | {"image_id": np.int32(self.number(index))}
        if rng := self._spoilt("texts", index):
            words = ~np.isin(row["tokens"], (self._tokenizer.pad_id, self._tokenizer.eos_id))
            row["tokens"][words] = rng.integers(self._tokenizer.vocab_size, size=words.sum())
            row["text_id"] = text_id(row["tokens"].tobytes())
        return row

    def text(self, index: int) -> str:
        """The caption of a row."""
        if rng := self._spoilt("pairs", index):
            index = int(rng.integers(len(self)))
        rng = np.random.Generator(np.random.PCG64((CAPTIONS, index)))
        return caption(self.scenes[index % len(self.scenes)], rng)

    @property
    def num_pictures(self) -> int:
        """Pictures that rows may show: of the scenes, and behind them those of noise."""
        return len(self.scenes) + NOISE_PICTURES * (self._noise == "images")

    def number(self, index: int) -> int:
        """Number of the picture that a row shows."""
        if rng := self._spoilt("images", index):
            return len(self.scenes) + int(rng.integers(NOISE_PICTURES))
        return index % len(self.scenes)

    def picture(self, number: int) -> np.ndarray:
        """A picture by its number, uint8 [I, I, 3]."""
        if number < len(self.scenes):
            return np.array(self._images[number])
        rng = np.random.Generator(np.random.PCG64((SPOILT, number)))
        return rng.integers(256, size=self._images.shape[1:], dtype=np.uint8)

    def image(self, index: int) -> np.ndarray:
        """The picture of a row."""
        return self.picture(self.number(index))

    def _spoilt(self, what: str, index: int) -> np.random.Generator | None:
        """What spoils this part of a row, if anything does."""
        if what != self._noise:
            return None
        rng = np.random.Generator(np.random.PCG64((SPOILT, NOISE.index(what), index)))
        return rng if rng.random() < self._share else None


class CaptionedFeatures(DataSource):
    """Rows of captioned scenes with `features` [P, D] in place of the picture, from those of every picture in turn."""

    def __init__(self, scenes: CaptionedScenes, features: np.ndarray):
        self._scenes, self._features = scenes, features

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {FEATURES: self._features[self._scenes.number(index)]} | self._scenes.texts(index)


def encode_pictures(
    scenes: CaptionedScenes, encode: Callable[[np.ndarray], np.ndarray], told: Callable, at_once: int = 64
) -> np.ndarray:
    """Features [N, P, D] of all pictures.

    Args:
      scenes: whose `num_pictures` N.
      encode: of exactly `at_once` pictures uint8 [B, I, I, 3].
      told: `told(done, total)` is told how far it got.
    """
    number, parts = scenes.num_pictures, []
    for start in range(0, number, at_once):
        numbers = [min(index, number - 1) for index in range(start, start + at_once)]
        parts.append(encode(np.stack([scenes.picture(index) for index in numbers])))
        told(min(start + at_once, number), number)
    return np.concatenate(parts)[:number]


class CaptionedRecords(GuardedSource):
    """Rows of a source whose records have a picture, and the caption as their suffix; bad ones come with weight 0."""

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        preprocessing: Preprocessing,
        *,
        on_error: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        def prepare(record: Record) -> dict[str, np.ndarray]:
            try:
                image = preprocessing.resize(preprocessing.decode(record.image))
            except BadRow as error:
                raise BadRow(f"{cut(record.image_name)}: {error}") from error
            return {"image": image} | text_row(tokenizer, record.suffix) | {"image_id": np.int32(record.image_index)}

        super().__init__(source, prepare, on_error=on_error, max_bad_fraction=max_bad_fraction)

    def text(self, index: int) -> str:
        """The caption of a row."""
        return suffix_of(self.source, index)

    def image(self, index: int) -> np.ndarray:
        """The picture of a row as the model sees it, uint8 [I, I, 3]."""
        return self[index]["image"]


def text_row(tokenizer: TextTokenizer, text: str) -> dict[str, np.ndarray]:
    """Tokens [L] of a caption, their mask, and `text_id`."""
    (tokens,), (mask,) = tokenizer([text])
    return {"tokens": tokens, "mask": mask, "text_id": text_id(text.encode())}


def text_id(text: bytes) -> np.int32:
    """Equal for equal texts, and for hardly any others."""
    return np.uint32(zlib.crc32(text)).view(np.int32)
