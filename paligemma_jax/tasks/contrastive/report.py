"""Metrics of a contrastive run (retrieval, zero-shot classification of single objects, calibration) and figures."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax import zero_shot
from paligemma_jax.data.sources.captioned import CaptionedRecords, CaptionedScenes
from paligemma_jax.data.synthetic_clevr.captions import NUMBERS
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer
from paligemma_jax.inference.attribute_scoring import TEMPLATES, attribute_hits
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.zero_shot import Embedded
from train_jax.report.figure_text import drawable

RETRIEVAL = (*(f"{direction}_r{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)), "mean_r1")
COUNT_TEMPLATES = ("{}", "{}: a cube", "{}: a sphere and a cylinder")  # for images with several objects
ZERO_SHOT = (*(f"zero_shot_{name}" for name in TEMPLATES), "zero_shot_count")


def measure(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    pairs: CaptionedScenes | CaptionedRecords,
    objects: CaptionedScenes | None,
) -> dict[str, float]:
    """Returns retrieval recalls in both directions and, for scenes, zero-shot accuracies.

    Args:
      model: to measure.
      tokenizer: of the model.
      pairs: images with captions.
      objects: scenes with a single object, whose attributes are classified; None for data that are not scenes.
    """
    embedded = zero_shot.embed(model, pairs)
    return _metrics(model, tokenizer, pairs, objects, embedded, [pairs.text(row) for row in embedded.rows])


def mean_r1(model: DualEncoder, pairs: CaptionedScenes) -> float:
    """Returns the mean of R@1 in both directions."""
    embedded = zero_shot.embed(model, pairs)
    captions = [pairs.text(row) for row in embedded.rows]
    return zero_shot.retrieval(embedded.images, embedded.texts, captions)["mean_r1"]


def _metrics(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    pairs: CaptionedScenes | CaptionedRecords,
    objects: CaptionedScenes | None,
    embedded: Embedded,
    captions: list[str],
) -> dict[str, float]:
    metrics = dict(zero_shot.retrieval(embedded.images, embedded.texts, captions))
    if objects is not None and isinstance(pairs, CaptionedScenes):
        metrics |= _zero_shot_metrics(model, tokenizer, pairs, embedded.images, objects)
    return metrics


def _zero_shot_metrics(
    model: DualEncoder, tokenizer: TextTokenizer, pairs: CaptionedScenes, images: np.ndarray, objects: CaptionedScenes
) -> dict[str, float]:
    """Returns accuracies of the attributes of single objects, and of the number of objects in the pairs' images."""
    labels = [{name: scene["objects"][0][name] for name in TEMPLATES} for scene in objects.scenes]
    hits = attribute_hits(model, tokenizer, zero_shot.embed(model, objects).images, labels)
    metrics = {f"zero_shot_{name}": float(values.mean()) for name, values in hits.items()}
    counts = np.array([len(scene["objects"]) for scene in pairs.scenes])
    classes = [_count_phrase(number) for number in range(1, counts.max() + 1)]
    scores = images @ zero_shot.class_embeddings(model, tokenizer, classes, COUNT_TEMPLATES).T
    metrics["zero_shot_count"] = float((scores.argmax(1) + 1 == counts).mean())
    return metrics


def _count_phrase(number: int) -> str:
    """Returns the phrase by which captions give a number of objects."""
    return f"{NUMBERS[number]} object{'s' if number > 1 else ''}"


def report(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    pairs: CaptionedScenes | CaptionedRecords,
    objects: CaptionedScenes | None,
    workdir: Path,
) -> dict[str, Any]:
    """Returns the metrics of `measure` and saves similarity.png and neighbours.png in `workdir`.

    For a model with a bias (SigLIP) also returns `calibration_error`, the difference between its likelihoods and the
    share of pairs that are true, over all pairs of an image and a text, and saves calibration.png.
    """
    embedded = zero_shot.embed(model, pairs)
    images, texts, rows = embedded
    captions = [pairs.text(row) for row in rows]
    number = min(12, len(rows))
    save_similarity(images[:number] @ texts[:number].T, captions[:number], workdir / "similarity.png")
    save_neighbours(images @ texts.T, captions, lambda index: pairs.image(rows[index]), workdir / "neighbours.png")
    metrics = _metrics(model, tokenizer, pairs, objects, embedded, captions)
    if model.logit_bias is not None:
        likelihoods = np.asarray(jax.nn.sigmoid(model.logits(jnp.asarray(images), jnp.asarray(texts))))
        # A caption may be true of other images too; it is certainly true of those with an equal caption.
        equal = np.array(captions)[:, None] == np.array(captions)[None]
        bins = zero_shot.calibration(likelihoods.ravel(), equal.ravel())
        metrics["calibration_error"] = zero_shot.calibration_error(bins)
        save_calibration(bins, workdir / "calibration.png")
    return metrics


def save_calibration(bins: zero_shot.Calibration, file: Path) -> None:
    """Plots the share of true pairs, and the number of pairs, against the likelihood that the model gives them."""
    figure = _figure(6, 6.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = bins.count > 0
    above.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    above.plot(bins.likely[filled], bins.true[filled], marker="o", label="model")
    above.set(ylabel="share of true pairs", xlim=(0, 1), ylim=(0, 1))
    above.legend()
    below.bar((np.arange(len(bins.count)) + 0.5) / len(bins.count), bins.count, 0.9 / len(bins.count))
    below.set(xlabel="likelihood, sigmoid of the logit", ylabel="pairs", yscale="log")
    figure.savefig(file, dpi=100)


def save_similarity(cosines: np.ndarray, captions: list[str], file: Path) -> None:
    """Plots a heat map of images (rows) against captions (columns); pairs are on the diagonal."""
    figure = _figure(9, 8)
    axis = figure.subplots()
    heat_map = axis.imshow(cosines, cmap="viridis")
    axis.set_yticks(range(len(captions)), [f"image {number}" for number in range(len(captions))])
    short = [caption if len(caption) < 34 else f"{caption[:32]}..." for caption in captions]
    axis.set_xticks(range(len(captions)), short, rotation=45, ha="right", fontsize=7)
    figure.colorbar(heat_map, label="cosine")
    figure.savefig(file, dpi=100)


def save_neighbours(
    cosines: np.ndarray,
    captions: list[str],
    image: Callable[[int], np.ndarray],
    file: Path,
    queries: int = 5,
    shown: int = 5,
) -> None:
    """Plots captions with the images most similar to them, best first; the caption's own images have a green frame.

    Args:
      cosines: of every image (rows) with every caption (columns).
      captions: one an image.
      image: returns an image by its row.
      file: the PNG to write.
      queries: number of captions.
      shown: number of images for each.
    """
    queries, shown = min(queries, len(captions)), min(shown, len(captions))
    figure = _figure(1.6 * shown, 1.9 * queries)
    for query, part in enumerate(figure.subfigures(queries, 1, squeeze=False)[:, 0]):
        part.suptitle(drawable(textwrap.fill(captions[query], 90)), x=0.01, ha="left", fontsize=8, parse_math=False)
        best = np.argsort(-cosines[:, query], kind="stable")[:shown]
        for axis, index in zip(part.subplots(1, shown, squeeze=False)[0], best, strict=True):
            axis.imshow(image(int(index)))
            axis.set(xticks=[], yticks=[])
            if captions[index] == captions[query]:
                for spine in axis.spines.values():
                    spine.set(color="green", linewidth=4)
    figure.savefig(file, dpi=100)


def _figure(width: int | float, height: int | float) -> Any:
    """Returns an empty figure of this size in inches."""
    from matplotlib.figure import Figure  # takes 0.5 s to import, and is needed once at the end

    return Figure(figsize=(width, height), layout="constrained")
