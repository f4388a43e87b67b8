"""What a contrastive run measures: retrieval, zero-shot classification of single objects, and pictures of both."""

from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax import zero_shot
from paligemma_jax.data.captioned import CaptionedScenes
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.text_tokens import TextTokenizer
from paligemma_jax.models.dual_encoder import DualEncoder

RETRIEVAL = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
TEMPLATES = {
    "color": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
    "shape": ("a {}", "a large {}", "a small {}", "one object: a {}"),
    "material": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
    "size": ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube"),
}
ZERO_SHOT = tuple(f"zero_shot_{name}" for name in TEMPLATES)


def measure(
    model: DualEncoder, tokenizer: TextTokenizer, pairs: CaptionedScenes, objects: CaptionedScenes
) -> dict[str, float]:
    """Recalls of `pairs` both ways, and accuracies of what the single objects are."""
    images, texts = zero_shot.embed(model, [pairs[index] for index in range(len(pairs))])
    found = dict(zero_shot.retrieval(images, texts))
    embedded, _ = zero_shot.embed(model, [objects[index] for index in range(len(objects))])
    for name, templates in TEMPLATES.items():
        values = list(ATTRIBUTES[name])
        scores = embedded @ zero_shot.class_embeddings(model, tokenizer, values, templates).T
        right = np.array([values.index(scene["objects"][0][name]) for scene in objects.scenes])
        found[f"zero_shot_{name}"] = float((scores.argmax(1) == right).mean())
    return found


def report(
    model: DualEncoder, tokenizer: TextTokenizer, pairs: CaptionedScenes, objects: CaptionedScenes, workdir: Path
) -> dict[str, Any]:
    """`measure`, and in `workdir` similarity.png and neighbours.png."""
    number = min(12, len(pairs))
    images, texts = zero_shot.embed(model, [pairs[index] for index in range(len(pairs))])
    save_similarity(
        images[:number] @ texts[:number].T, [pairs.text(index) for index in range(number)], workdir / "similarity.png"
    )
    save_neighbours(images @ texts.T, pairs, workdir / "neighbours.png")
    return measure(model, tokenizer, pairs, objects)


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


def save_neighbours(cosines: np.ndarray, pairs: CaptionedScenes, file: Path, queries: int = 5, shown: int = 5) -> None:
    """Captions and the pictures most like them, best first; the caption's own has a green frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    queries, shown = min(queries, len(pairs)), min(shown, len(pairs))
    figure = Figure(figsize=(2 * shown, 2.4 * queries), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(queries, shown, squeeze=False)
    for query, row in enumerate(axes):
        for axis, index in zip(row, np.argsort(-cosines[:, query], kind="stable")[:shown], strict=True):
            axis.imshow(pairs.image(int(index)))
            axis.set(xticks=[], yticks=[])
            if index == query:
                for side in axis.spines.values():
                    side.set(color="green", linewidth=4)
        row[0].set_title(pairs.text(query), fontsize=8, loc="left", parse_math=False)
    figure.savefig(file, dpi=100)
