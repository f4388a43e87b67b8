"""What a few-shot run measures: accuracy on every set of its protocol, and pictures of what is mistaken for what.

Axes: N images, C classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from paligemma_jax import zero_shot
from paligemma_jax.adapt.few_shot.prompts import check_texts
from paligemma_jax.data.few_shot.dataset import BASE, NOVEL, FewShot
from paligemma_jax.data.few_shot.descriptions import fill
from paligemma_jax.data.few_shot.protocols import Protocol
from paligemma_jax.data.few_shot.rows import LabelledRows
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks.coprompt.scores import accuracy, harmonic_mean
from paligemma_jax.tasks.image_sheet import save_sheet
from train_jax.core import files

SHOWN = 24  # pictures of the sheet of mistakes
RESERVED = (
    *("source", "target_mean", "examples"),
    *("step", "seconds", "peak_memory_bytes", "step_temp_bytes", "trainable_parameters", "finished"),
)
"""Numbers of eval.json beside those of the sets: ours and the runtime's."""


class Scored(NamedTuple):
    """Cosines of the images of a set that can be read, their classes, and their rows."""

    scores: Float[np.ndarray, "N C"]
    labels: Int[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]

    @property
    def accuracy(self) -> float:
        """0 to 1; ties count against the model."""
        return accuracy(self.scores, self.labels)


def score(
    model: DualEncoder, tokenizer: TextTokenizer, template: str, data: FewShot, split: str = "test", **bad: Any
) -> Scored:
    """How alike every image of a split is to every class.

    Args:
      model: with prompts or without.
      template: how classes are written.
      bad: see `LabelledRows`.

    Raises:
      UserError: class texts that prompts would spoil, or too many images that cannot be read.
    """
    check_texts(model, tokenizer([fill(template, name) for name in data.classes])[0])
    texts = zero_shot.class_embeddings(model, tokenizer, data.classes, (template,))
    source = LabelledRows(data, model.config.preprocessing, split, **bad)
    scores, labels, rows = [], [], []
    for start in range(0, len(source), zero_shot.AT_ONCE):
        numbers = np.arange(start, min(start + zero_shot.AT_ONCE, len(source)))
        part = [source[int(number)] for number in numbers]
        source.on_rows(numbers, np.array([row["bad"] for row in part]))
        pixels = np.stack([row["image"] for row in part])
        # The last batch is filled up, so that one program does.
        pixels = np.pad(pixels, [(0, zero_shot.AT_ONCE - len(part)), (0, 0), (0, 0), (0, 0)])
        embedded = np.asarray(zero_shot.embed_pixels(model, jnp.asarray(pixels)))[: len(part)]
        good = np.array([row["weight"] > 0 for row in part])
        scores.append((embedded @ texts.T)[good])
        labels.append(np.array([row["label"] for row in part], np.int32)[good])
        rows.append(numbers[good])
    source.check()
    return Scored(np.concatenate(scores), np.concatenate(labels), np.concatenate(rows))


def summarize(kind: str, accuracies: Mapping[str, float], tuned: str) -> dict[str, float]:
    """The numbers of a protocol, 0 to 1.

    Args:
      kind: of the protocol.
      accuracies: by the name of what was tested on.
      tuned: of these, the data set that was tuned on.

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
    model: DualEncoder, tokenizer: TextTokenizer, template: str, protocol: Protocol, workdir: Path, **bad: Any
) -> dict[str, Any]:
    """`summarize` of the test images, and `examples` of each set; in `workdir` predictions.jsonl, confusion.png of
    what is taken for what, and mistakes.png.
    """
    scored = {name: score(model, tokenizer, template, data, **bad) for name, data in protocol.tested.items()}
    write_predictions(scored, protocol, workdir / "predictions.jsonl")
    save_confusion({name: (found, protocol.tested[name].classes) for name, found in scored.items()}, workdir)
    save_mistakes(scored, protocol, model, workdir / "mistakes.png", **bad)
    accuracies = {name: found.accuracy for name, found in scored.items()}
    examples = {name: len(found.labels) for name, found in scored.items()}
    return summarize(protocol.kind, accuracies, protocol.tuned.name) | {"examples": examples}


def write_predictions(scored: Mapping[str, Scored], protocol: Protocol, file: Path) -> None:
    """A line for each test image: its set, its path, its class and the one that scored highest."""
    lines = []
    for name, (scores, labels, rows) in scored.items():
        data = protocol.tested[name]
        for best, label, row in zip(scores.argmax(1), labels, rows, strict=True):
            image = data.splits["test"][row].image
            line = {"set": name, "image": image, "class": data.classes[label], "predicted": data.classes[best]}
            lines.append(files.to_json(line) + "\n")
    files.write_atomically(file, "".join(lines))


def confusion(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> Float[np.ndarray, "C C"]:
    """Of the images of each class (rows) the share that is taken for each class (columns); NaN of one without any."""
    C = scores.shape[1]
    counts = np.zeros((C, C))
    np.add.at(counts, (labels, scores.argmax(1)), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def save_confusion(scored: Mapping[str, tuple[Scored, tuple[str, ...]]], workdir: Path) -> None:
    """confusion.png: a heat map of `confusion` for each set; names where there are few classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5 * len(scored), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, (found, classes)) in zip(
        figure.subplots(1, len(scored), squeeze=False)[0], scored.items(), strict=True
    ):
        picture = axis.imshow(confusion(found.scores, found.labels), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"{name}: accuracy {found.accuracy:.3f}", parse_math=False)
        axis.set(xlabel="taken for", ylabel="class")
        if len(classes) <= 60:
            axis.set_yticks(range(len(classes)), classes, fontsize=5, parse_math=False)
            axis.set_xticks(range(len(classes)), classes, fontsize=5, rotation=90, parse_math=False)
    figure.colorbar(picture, label="share of the class's images")
    figure.savefig(workdir / "confusion.png", dpi=110)


def save_mistakes(scored: Mapping[str, Scored], protocol: Protocol, model: DualEncoder, file: Path, **bad: Any) -> None:
    """Pictures with what they show and what they are taken for, from all sets in turn; of no mistakes no file."""
    images, texts = [], []
    each = -(-SHOWN // len(scored))
    for name, found in scored.items():
        data = protocol.tested[name]
        source = LabelledRows(data, model.config.preprocessing, **bad)
        best = found.scores.argmax(1)
        wrong = np.flatnonzero(best != found.labels)
        for at in wrong[np.linspace(0, len(wrong) - 1, min(each, len(wrong))).astype(int)]:
            images.append(source[int(found.rows[at])]["image"])
            texts.append(f"{data.classes[found.labels[at]]}, not {data.classes[best[at]]}")
    if images:
        save_sheet(images, texts, file)
