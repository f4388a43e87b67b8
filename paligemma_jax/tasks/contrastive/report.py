"""What a contrastive run measures: retrieval, zero-shot classification of single objects, and pictures of both."""

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
from paligemma_jax.inference.attributes import TEMPLATES, attribute_hits
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.zero_shot import Embedded

RETRIEVAL = (*(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)), "mean_r1")
COUNT_TEMPLATES = ("{}", "{}: a cube", "{}: a sphere and a cylinder")  # of pictures with several objects
ZERO_SHOT = (*(f"zero_shot_{name}" for name in TEMPLATES), "zero_shot_count")


def measure(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    pairs: CaptionedScenes | CaptionedRecords,
    objects: CaptionedScenes | None,
) -> dict[str, float]:
    """Recalls of `pairs` both ways and, of scenes, accuracies of what the single `objects` are and of their count."""
    embedded = zero_shot.embed(model, pairs)
    return _measure(model, tokenizer, pairs, objects, embedded, [pairs.text(row) for row in embedded.rows])


def mean_r1(model: DualEncoder, pairs: CaptionedScenes) -> float:
    """The mean of R@1 both ways."""
    embedded = zero_shot.embed(model, pairs)
    captions = [pairs.text(row) for row in embedded.rows]
    return zero_shot.retrieval(embedded.images, embedded.texts, captions)["mean_r1"]


def _measure(
    model: DualEncoder, tokenizer: TextTokenizer, pairs, objects, embedded: Embedded, captions: list[str]
) -> dict[str, float]:
    found = dict(zero_shot.retrieval(embedded.images, embedded.texts, captions))
    if objects is not None:
        found |= _classified(model, tokenizer, pairs, embedded.images, objects)
    return found


def _classified(
    model: DualEncoder, tokenizer: TextTokenizer, pairs: CaptionedScenes, images: np.ndarray, objects: CaptionedScenes
) -> dict[str, float]:
    """Zero-shot accuracies: attributes of single objects, and how many objects the pairs' `images` show."""
    shown = [{name: scene["objects"][0][name] for name in TEMPLATES} for scene in objects.scenes]
    right = attribute_hits(model, tokenizer, zero_shot.embed(model, objects).images, shown)
    found = {f"zero_shot_{name}": float(values.mean()) for name, values in right.items()}
    counts = np.array([len(scene["objects"]) for scene in pairs.scenes])
    values = [_count(number) for number in range(1, counts.max() + 1)]
    scores = images @ zero_shot.class_embeddings(model, tokenizer, values, COUNT_TEMPLATES).T
    found["zero_shot_count"] = float((scores.argmax(1) + 1 == counts).mean())
    return found


def _count(number: int) -> str:
    """As captions count."""
    return f"{NUMBERS[number]} object{'s' if number > 1 else ''}"


def report(
    model: DualEncoder,
    tokenizer: TextTokenizer,
    pairs: CaptionedScenes | CaptionedRecords,
    objects: CaptionedScenes | None,
    workdir: Path,
) -> dict[str, Any]:
    """`measure`, and in `workdir` similarity.png and neighbours.png.

    Of a model with a bias (SigLIP) also `calibration_error`, how far its likelihoods are from how often they come true
    among all pairs of a picture and a text, and calibration.png.
    """
    embedded = zero_shot.embed(model, pairs)
    images, texts, rows = embedded
    captions = [pairs.text(row) for row in rows]
    number = min(12, len(rows))
    save_similarity(images[:number] @ texts[:number].T, captions[:number], workdir / "similarity.png")
    save_neighbours(images @ texts.T, captions, lambda index: pairs.image(rows[index]), workdir / "neighbours.png")
    found = _measure(model, tokenizer, pairs, objects, embedded, captions)
    if model.logit_bias is not None:
        likely = np.asarray(jax.nn.sigmoid(model.logits(jnp.asarray(images), jnp.asarray(texts))))
        # A caption may be true of other pictures too; of those with the very same one it is.
        own = np.array(captions)
        bins = zero_shot.calibration(likely.ravel(), (own[:, None] == own[None]).ravel())
        found["calibration_error"] = zero_shot.calibration_error(bins)
        save_calibration(bins, workdir / "calibration.png")
    return found


def save_calibration(bins: zero_shot.Calibration, file: Path) -> None:
    """How often pairs are true against how likely the model finds them, and how many pairs there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    """A heat map of images (rows) against captions (columns); pairs are on the diagonal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    picture = axis.imshow(cosines, cmap="viridis")
    axis.set_yticks(range(len(captions)), [f"image {number}" for number in range(len(captions))])
    short = [caption if len(caption) < 34 else f"{caption[:32]}..." for caption in captions]
    axis.set_xticks(range(len(captions)), short, rotation=45, ha="right", fontsize=7)
    figure.colorbar(picture, label="cosine")
    figure.savefig(file, dpi=100)


def save_neighbours(
    cosines: np.ndarray,
    captions: list[str],
    picture: Callable[[int], np.ndarray],
    file: Path,
    queries: int = 5,
    shown: int = 5,
) -> None:
    """Captions and the pictures most like them, best first; those that it is the caption of have a green frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    queries, shown = min(queries, len(captions)), min(shown, len(captions))
    figure = Figure(figsize=(1.6 * shown, 1.9 * queries), layout="constrained")
    FigureCanvasAgg(figure)
    for query, part in enumerate(figure.subfigures(queries, 1, squeeze=False)[:, 0]):
        part.suptitle(textwrap.fill(captions[query], 90), x=0.01, ha="left", fontsize=8, parse_math=False)
        best = np.argsort(-cosines[:, query], kind="stable")[:shown]
        for axis, index in zip(part.subplots(1, shown, squeeze=False)[0], best, strict=True):
            axis.imshow(picture(int(index)))
            axis.set(xticks=[], yticks=[])
            if captions[index] == captions[query]:
                for side in axis.spines.values():
                    side.set(color="green", linewidth=4)
    figure.savefig(file, dpi=100)
