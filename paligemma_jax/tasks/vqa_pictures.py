"""The contact sheet: scenes with a question, the reference and the prediction."""

import io
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image

from paligemma_jax.data.records import Source
from paligemma_jax.metrics import exact_match
from paligemma_jax.tasks.vqa_answer import Answer

matplotlib.use("Agg")


def save_sheet(source: Source, answers: list[Answer], file: Path, columns: int = 4) -> None:
    """Draws the answers' scenes in a grid; right answers green, wrong ones red.

    Args:
      source: where the answers come from, for the pictures.
      answers: one a scene, in the source's order.
      file: the PNG.
    """
    import matplotlib.pyplot as plt

    if not answers:
        return
    pictures = _pictures(source, {answer.image_name for answer in answers})
    rows = -(-len(answers) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 4.0 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer in zip(axes.flat, answers, strict=False):
        axis.imshow(pictures[answer.image_name])
        right = exact_match(answer.prediction, answer.reference)
        said = f"{answer.prediction}" if right else f"{answer.prediction}  (is {answer.reference})"
        question = "\n".join(textwrap.wrap(answer.question, 38))
        axis.set_title(question, fontsize=8, loc="left")
        axis.text(0.0, -0.03, said, fontsize=10, color="green" if right else "red", va="top", transform=axis.transAxes)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _pictures(source: Source, names: set[str]) -> dict[str, Image.Image]:
    """The images with these names, found from the start of the source."""
    found: dict[str, Image.Image] = {}
    index = 0
    while len(found) < len(names) and index < len(source):
        try:
            record = source[index]
            if record.image_name in names and record.image_name not in found:
                found[record.image_name] = Image.open(io.BytesIO(record.image)).convert("RGB")
        except (ValueError, OSError):
            pass  # a bad row has no answer to show
        index += 1
    return found
