"""Metrics of a few-shot run: accuracy on every set of its protocol; and figures of confusions and mistakes.

Axes: N images, C classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from paligemma_jax import zero_shot
from paligemma_jax.adapt.few_shot.learned_prompts import check_texts
from paligemma_jax.data.few_shot.dataset import BASE, NOVEL, FewShot
from paligemma_jax.data.few_shot.descriptions import fill
from paligemma_jax.data.few_shot.protocols import Protocol
from paligemma_jax.data.few_shot.rows import LabelledRows
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks.coprompt.scores import accuracy, harmonic_mean
from paligemma_jax.tasks.image_sheet import save_image_sheet
from train_jax.core import files
from train_jax.report.figure_text import drawable

SHOWN = 24  # images of the figure of mistakes
RESERVED = (
    *("source", "target_mean", "examples"),
    *("step", "seconds", "peak_memory_bytes", "step_temp_bytes", "trainable_parameters", "finished"),
)
"""Names of other numbers of eval.json than the accuracies of the sets: this task's and the runtime's."""


class Scores(NamedTuple):
    """Cosines of the readable images of a set with all classes, the images' labels, and their rows in the set."""

    scores: Float[np.ndarray, "N C"]
    labels: Int[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]

    @property
    def accuracy(self) -> float:
        """From 0 to 1; ties count as wrong."""
        return accuracy(self.scores, self.labels)


def score(
    model: DualEncoder, tokenizer: TextTokenizer, template: str, data: FewShot, split: str = "test", **bad_rows: Any
) -> Scores:
    """Returns the cosines of every image of a split with every class.

    Args:
      model: with prompts or without.
      tokenizer: of the model.
      template: text of a class, with {} for its name.
      data: the data set.
      split: "val" or "test".
      bad_rows: options of `LabelledRows` for images that cannot be read.

    Raises:
      UserError: prompts would replace parts of the class texts, or too many images cannot be read.
    """
    check_texts(model, tokenizer([fill(template, name) for name in data.classes])[0])
    texts = zero_shot.class_embeddings(model, tokenizer, data.classes, (template,))
    source = LabelledRows(data, preprocessing_of(model.config), split, **bad_rows)
    scores, labels, rows = [], [], []
    for start in range(0, len(source), zero_shot.BATCH_SIZE):
        numbers = np.arange(start, min(start + zero_shot.BATCH_SIZE, len(source)))
        part = [source[int(number)] for number in numbers]
        source.on_rows(numbers, np.array([row["bad"] for row in part]))
        pixels = np.stack([row["image"] for row in part])
        # The last batch is padded, so that one compiled program suffices.
        pixels = np.pad(pixels, [(0, zero_shot.BATCH_SIZE - len(part)), (0, 0), (0, 0), (0, 0)])
        embedded = np.asarray(zero_shot.embed_pixels(model, jnp.asarray(pixels)))[: len(part)]
        good = np.array([row["weight"] > 0 for row in part])
        scores.append((embedded @ texts.T)[good])
        labels.append(np.array([row["label"] for row in part], np.int32)[good])
        rows.append(numbers[good])
    source.check()
    return Scores(np.concatenate(scores), np.concatenate(labels), np.concatenate(rows))


def summarize(kind: str, accuracies: Mapping[str, float], tuned: str) -> dict[str, float]:
    """Returns the numbers of a protocol, 0 to 1.

    Args:
      kind: of the protocol.
      accuracies: by the name of the test set.
      tuned: name of the data set that the run was tuned on.

    Returns:
      base_to_novel: `base`, `novel`, `harmonic_mean`. few_shot: `accuracy`. The others: `source`, each further set
      by its name, and `target_mean`, their mean.
    """
    if kind == "base_to_novel":
        base, novel = accuracies[BASE], accuracies[NOVEL]
        return {"base": base, "novel": novel, "harmonic_mean": harmonic_mean(base, novel)}
    if kind == "few_shot":
        return {"accuracy": accuracies["test"]}
    targets = {name: value for name, value in accuracies.items() if name != tuned}
    return {"source": accuracies[tuned], **targets, "target_mean": float(np.mean(list(targets.values())))}


def report(
    model: DualEncoder, tokenizer: TextTokenizer, template: str, protocol: Protocol, workdir: Path, **bad_rows: Any
) -> dict[str, Any]:
    """Returns the numbers of `summarize` on the test sets, and `examples` of each set.

    Writes predictions.jsonl, confusion.png and mistakes.png to `workdir`.
    """
    by_set = {name: score(model, tokenizer, template, data, **bad_rows) for name, data in protocol.tested.items()}
    write_predictions(by_set, protocol, workdir / "predictions.jsonl")
    save_confusion({name: (scores, protocol.tested[name].classes) for name, scores in by_set.items()}, workdir)
    save_mistakes(by_set, protocol, model, workdir / "mistakes.png", **bad_rows)
    accuracies = {name: scores.accuracy for name, scores in by_set.items()}
    examples = {name: len(scores.labels) for name, scores in by_set.items()}
    return summarize(protocol.kind, accuracies, protocol.tuned.name) | {"examples": examples}


def write_predictions(by_set: Mapping[str, Scores], protocol: Protocol, file: Path) -> None:
    """Writes a line for each test image: its set, its path, its class and the predicted class."""
    lines = []
    for name, (scores, labels, rows) in by_set.items():
        data = protocol.tested[name]
        for best, label, row in zip(scores.argmax(1), labels, rows, strict=True):
            image = data.splits["test"][row].image
            line = {"set": name, "image": image, "class": data.classes[label], "predicted": data.classes[best]}
            lines.append(files.to_json(line) + "\n")
    files.write_atomically(file, "".join(lines))


def confusion(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> Float[np.ndarray, "C C"]:
    """Returns the share of the images of each class (rows) predicted as each class (columns); NaN without images."""
    C = scores.shape[1]
    counts = np.zeros((C, C))
    np.add.at(counts, (labels, scores.argmax(1)), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def save_confusion(by_set: Mapping[str, tuple[Scores, tuple[str, ...]]], workdir: Path) -> None:
    """Saves confusion.png: a heat map of `confusion` for each set, with class names for up to 60 classes."""
    from matplotlib.figure import Figure  # takes 0.5 s to import, and is needed once at the end

    figure = Figure(figsize=(7.5 * len(by_set), 6.5), layout="constrained")
    axes = figure.subplots(1, len(by_set), squeeze=False)[0]
    for axis, (name, (scores, classes)) in zip(axes, by_set.items(), strict=True):
        axis.imshow(confusion(scores.scores, scores.labels), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(drawable(f"{name}: accuracy {scores.accuracy:.3f}"), parse_math=False)
        axis.set(xlabel="predicted class", ylabel="class")
        if len(classes) <= 60:
            labels = list(map(drawable, classes))
            axis.set_yticks(range(len(classes)), labels, fontsize=5, parse_math=False)
            axis.set_xticks(range(len(classes)), labels, fontsize=5, rotation=90, parse_math=False)
    figure.colorbar(axes[-1].images[0], label="share of the class's images")
    figure.savefig(workdir / "confusion.png", dpi=110)


def save_mistakes(
    by_set: Mapping[str, Scores], protocol: Protocol, model: DualEncoder, file: Path, **bad_rows: Any
) -> None:
    """Saves misclassified images of all sets with their class and the predicted one; no file without mistakes."""
    images, texts = [], []
    images_per_set = -(-SHOWN // len(by_set))
    for name, scores in by_set.items():
        data = protocol.tested[name]
        source = LabelledRows(data, preprocessing_of(model.config), **bad_rows)
        best = scores.scores.argmax(1)
        wrong = np.flatnonzero(best != scores.labels)
        for at in wrong[np.linspace(0, len(wrong) - 1, min(images_per_set, len(wrong))).astype(int)]:
            images.append(source[int(scores.rows[at])]["image"])
            texts.append(f"{data.classes[scores.labels[at]]}, not {data.classes[best[at]]}")
    if images:
        save_image_sheet(images, texts, file)
