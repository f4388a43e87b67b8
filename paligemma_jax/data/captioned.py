"""Pictures with captions: rows for contrastive training. Axes: I pixels a side, L tokens of a text."""

import json
import zlib
from pathlib import Path

import numpy as np

from paligemma_jax.data.synthetic_clevr.captions import caption
from paligemma_jax.data.text_tokens import TextTokenizer

CAPTIONS = zlib.crc32(b"captions")


class CaptionedScenes:
    """Synthetic scenes that `pretraining_set.build` has made; row i is caption i // n of scene i % n of n scenes.

    Captions are not stored: each is a function of its row, and a scene comes with another one every time (`views`).
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, views: int = 1):
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self.scenes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
        self._tokenizer, self._views = tokenizer, views

    def __len__(self) -> int:
        return len(self.scenes) * self._views

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """uint8 image [I, I, 3], tokens [L] and their mask, and `text_id`, equal for equal captions."""
        text = self.text(index)
        (tokens,), (mask,) = self._tokenizer([text])
        return {"image": self.image(index), "tokens": tokens, "mask": mask, "text_id": text_id(text)}

    def image(self, index: int) -> np.ndarray:
        """The picture of a row."""
        return np.array(self._images[index % len(self.scenes)])

    def text(self, index: int) -> str:
        """The caption of a row."""
        rng = np.random.Generator(np.random.PCG64((CAPTIONS, index)))
        return caption(self.scenes[index % len(self.scenes)], rng)


def text_id(text: str) -> np.int32:
    """Equal for equal texts, and for hardly any others."""
    return np.uint32(zlib.crc32(text.encode())).view(np.int32)
