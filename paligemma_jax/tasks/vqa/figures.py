"""The contact sheet: scenes with a question, the reference and the prediction."""

import io
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image

from paligemma_jax.data.records import Source
from paligemma_jax.metrics.text import exact_match
from paligemma_jax.tasks.vqa.answer import Answer
from train_jax.core.errors import UserError

matplotlib.use("Agg")


def save_sheet(
    source: Source, answers: list[Answer], file: Path, columns: int = 4, view_ratio: float | None = None
) -> None:
    """Draws the answers' scenes in a grid; right answers green, wrong ones red.

    Args:
      source: where the answers come from, for the pictures.
      answers: one a scene, in the source's order.
      file: the PNG.
      columns: of the grid.
      view_ratio: width over height of the view, where pictures may be stored squeezed; None shows pixels as squares.
    """
    import matplotlib.pyplot as plt

    if not answers:
        return
    pictures = _pictures(source, {answer.image for answer in answers})
    rows = -(-len(answers) // columns)
    height = 3.4 / (view_ratio or 1.0) + 1.3  # room for the answer above and three lines of question below
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, height * rows), squeeze=False)
    for axis in axes.flat[len(answers) :]:
        axis.axis("off")
    for axis, answer in zip(axes.flat, answers, strict=False):
        picture = pictures[answer.image]
        stretch = 1.0 if view_ratio is None else picture.width / picture.height / view_ratio
        axis.imshow(picture, aspect=stretch, interpolation="bilinear")
        axis.set_xticks([])
        axis.set_yticks([])
        right = exact_match(answer.prediction, answer.reference)
        said = answer.prediction.strip() or "(nothing)"
        said = said if right else f"{said}   (right: {answer.reference})"
        # Texts may hold any character, and a dollar sign begins no formula.
        axis.set_title(said, fontsize=11, color="green" if right else "red", parse_math=False)
        axis.set_xlabel("\n".join(textwrap.wrap(answer.question, 44)), fontsize=9, parse_math=False)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _pictures(source: Source, wanted: set[int | str]) -> dict[int | str, Image.Image]:
    """The images of these indices or names, found from the start of the source."""
    found: dict[int | str, Image.Image] = {}
    index = 0
    while len(found) < len(wanted) and index < len(source):
        try:
            record = source[index]
            for key in {record.image_index, record.image_name} & wanted - found.keys():
                found[key] = Image.open(io.BytesIO(record.image)).convert("RGB")
        except (UserError, OSError):  # as GuardedSource says of bad rows, which have no answer to show
            pass
        index += 1
    return found
