"""Pretrains the small base that ships with this package on texts about synthetic scenes. Axes: see models.

Two things make this feasible on a few CPU cores. Several texts share one image: they are packed in one row, and a text
attends to the image and to itself. And linear heads predict from every patch the attributes that it shows, which gets
the tower over its first plateau.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.prompts import TruncationError, make_example
from paligemma_jax.data.sources.pretraining_scenes import PretrainingScenes
from paligemma_jax.data.synthetic_clevr.pretraining_texts import every_box
from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer
from paligemma_jax.losses import token_cross_entropy
from paligemma_jax.tasks.pretraining.detection import detection_scores
from paligemma_jax.tasks.pretraining.scene_task import PretrainingModel, SceneDataKeys, SceneKeys, SceneTask, patch_loss
from train_jax.core.config_keys import key, section
from train_jax.core.data_source import DataSource
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics

TASKS = ("answer", "caption", "detect", "point", "describe")


class PackedTexts(DataSource):
    """Rows of one image and as many texts as fit into `length` tokens; see `pack`."""

    def __init__(self, scenes: PretrainingScenes, tokenizer: Tokenizer, length: int, text_weights: dict[str, float]):
        self._scenes, self._tokenizer, self._length, self._weights = scenes, tokenizer, length, text_weights

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, patches, segments = self._scenes.read(index)
        return {"image": image, "patches": patches} | pack(self._tokenizer, segments, self._length, self._weights)


def pack(
    tokenizer: Tokenizer, segments: Sequence[tuple[str, str]], length: int, text_weights: dict[str, float]
) -> dict[str, np.ndarray]:
    r"""Packs texts one after another into a row of `length` tokens.

      tokens    <bos> detect ball \n <loc> <bos> caption \n a   red   <pad>
      targets   .     .      .   <loc> <eos> .    .      a red <eos>   .
      segment   1     1      1    1    1     2    2      2 2    2      0
      suffix    0     0      0    0    1     0    0      0 1    1      0
      offset    0     1      2    3    4     0    1      2 3    4      0

    `suffix` is 1 for tokens with causal attention; `weight` is the text's weight at targets of the loss, else 0.
    A text that does not fit is left out.
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment", "suffix", "offset", "kind")}
    weight = np.zeros(length, np.float32)
    start = 0
    for number, (prefix, suffix) in enumerate(segments, start=1):
        kind = TASKS.index(prefix.split()[0])
        try:
            example = make_example(tokenizer, prefix, suffix, length - start)
        except TruncationError:
            continue  # a shorter text may still fit
        n = int(example["mask_input"].sum()) - 1
        tokens = example["tokens"][: n + 1]
        part = slice(start, start + n)
        row["tokens"][part], row["targets"][part] = tokens[:-1], tokens[1:]
        row["segment"][part], row["offset"][part] = number, np.arange(n)
        row["suffix"][part], row["kind"][part] = example["mask_ar"][:n], kind
        weight[part] = example["mask_loss"][1 : n + 1] * text_weights[TASKS[kind]]
        start += n
    return row | {"weight": weight}


@dataclasses.dataclass(frozen=True)
class TextDataKeys(SceneDataKeys):
    """`config.data`: scenes with texts."""

    views: int = key(100, "number of times that a scene is read with new texts before they repeat", minimum=1)
    text_length: int = key(192, "number of tokens of a row of packed texts", minimum=1)
    num_segments: int = key(
        16, "number of texts that are offered for a row; those that do not fit are left out", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class TextWeightKeys:
    """`config.weights`: of the loss of each kind of text."""

    answer: float = key(3.0, "weight of answers to questions", minimum=0)
    caption: float = key(0.5, "weight of captions", minimum=0)
    detect: float = key(0.3, "weight of boxes", minimum=0)
    point: float = key(0.5, "weight of locations", minimum=0)
    describe: float = key(1.0, "weight of descriptions of a location", minimum=0)


@dataclasses.dataclass(frozen=True)
class Keys(SceneKeys):
    """The keys of the task."""

    data: TextDataKeys = section(TextDataKeys)
    tokenizer: str = key("tiny", "folder or file of the tokenizer, or the name of one that ships with the package")
    patch_loss: float = key(0.5, "weight of the loss of the patch heads", minimum=0)
    weights: TextWeightKeys = section(TextWeightKeys)


class Pretraining(SceneTask):
    """Pretrains a PaliGemma on packed texts; see the module."""

    keys = Keys

    def __init__(self, config: ConfigDict, mesh):
        super().__init__(config, mesh)
        if not any(config.weights.values()):
            raise UserError("all of weights are 0, expected one above 0, as no text would count: raise one.")
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.tokenizer.fits(self.model_config.decoder.vocab_size)

    def trainable(self) -> str:
        """Returns the pattern of all parameters."""
        return r".*"

    def _source(self, stream: str, num_scenes: int, views: int) -> PackedTexts:
        data = self.config.data
        scenes = PretrainingScenes(self.rendered(stream, num_scenes), views, data.num_segments)
        return PackedTexts(scenes, self.tokenizer, data.text_length, dict(self.config.weights))

    def train_source(self) -> PackedTexts:
        """Returns the training rows."""
        return self._source("pretraining", self.config.data.num_scenes, self.config.data.views)

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns an empty row with the shapes of the training source."""
        return super().blank_row() | pack(self.tokenizer, [], self.config.data.text_length, dict(self.config.weights))

    def normalizer(self, batch) -> jax.Array:
        """Returns the sum of the weights of all targets."""
        return batch["weight"].sum()

    def forward(self, model: PretrainingModel, batch) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states at the text positions [B, T, D] and tower features [B, P, D]."""
        images = self.normalize(batch["image"])
        features, out = model.model.encode_image(images)
        packed = {name: batch[name] for name in ("tokens", "segment", "suffix", "offset")}
        return model.model.hidden_of_texts_behind_one_image(features, **packed), out["vision/encoded"]

    def loss(self, model: PretrainingModel, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the weighted cross-entropy of the texts plus the patch loss times the sum of the weights."""
        hidden, tower = self.forward(model, batch)
        table = model.model.decoder.embed_tokens.embedding[...]
        text = token_cross_entropy(hidden, table, batch["targets"], batch["weight"], chunk_size=1024)
        patch, metrics = patch_loss(model.patch_heads, tower, batch["patches"])
        weight = batch["weight"].sum()
        metrics = metrics | {"text_loss": (text, weight)}
        return text + self.config.patch_loss * weight * patch, metrics

    def validate(self, model: PretrainingModel) -> dict[str, float]:
        """Returns the teacher-forced accuracy of whole suffixes by kind of text, on held-out scenes."""
        source = self._source("pretraining-held-out", self.config.data.num_held_out, 1)
        total: dict[str, tuple[float, float]] = {}
        size = min(20, len(source))
        for index in range(0, len(source), size):
            rows = [source[i] for i in range(index, min(index + size, len(source)))]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            for name, (value, count) in jax.device_get(self._compiled_score(model, batch)).items():
                old = total.get(name, (0.0, 0.0))
                total[name] = (old[0] + float(value), old[1] + float(count))
        return {name: value / max(count, 1e-9) for name, (value, count) in total.items()}

    @functools.cached_property
    def _compiled_score(self) -> Callable[..., Metrics]:
        """`_score`, compiled once, however often the run evaluates."""
        return jax.jit(self._score)

    def _score(self, model: PretrainingModel, batch) -> Metrics:
        """Returns the accuracies of a batch as sums and counts."""
        hidden, tower = self.forward(model, batch)
        wrong = (model.model.decoder.logits(hidden).argmax(-1) != batch["targets"]) & (batch["weight"] > 0)
        n = self.config.data.num_segments + 1
        B = wrong.shape[0]
        rows = jnp.arange(B)[:, None]
        mistakes = jnp.zeros((B, n)).at[rows, batch["segment"]].add(wrong)
        kind = jnp.zeros((B, n), jnp.int32).at[rows, batch["segment"]].max(batch["kind"])
        present = jnp.zeros((B, n)).at[rows, batch["segment"]].max(batch["weight"] > 0)
        out = {}
        for number, name in enumerate(TASKS):
            counted = present * (kind == number) * (jnp.arange(n) > 0)[None]
            out[f"{name}_accuracy"] = ((mistakes == 0) * counted).sum(), counted.sum()
        return out | patch_loss(model.patch_heads, tower, batch["patches"])[1]

    def evaluate(
        self, model: PretrainingModel, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Returns the metrics of `validate` and the detection scores of the same scenes (detection.py)."""
        scenes = PretrainingScenes(self.rendered("pretraining-held-out", self.config.data.num_held_out), 1, 0)
        images = [scenes.read(index)[0] for index in range(len(scenes))]
        texts = [every_box(scenes.scene(index)) for index in range(len(scenes))]
        return self.validate(model) | detection_scores(model.model, self.tokenizer, images, texts)
