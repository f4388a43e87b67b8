"""A figure of scenes, each with a question, the prediction and the reference."""

import contextlib
import io
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from paligemma_jax.data.records import RecordSource
from paligemma_jax.tasks.vqa.answer_record import Answer
from train_jax.core.errors import UserError
from train_jax.report.figure_text import drawable


def save_answer_sheet(
    source: RecordSource, answers: list[Answer], file: Path, columns: int = 4, view_ratio: float | None = None
) -> None:
    """Saves a grid of the answers' scenes; correct answers are green, wrong ones red. Writes nothing without answers.

    Args:
      source: the records answered, with their images.
      answers: one a scene, in the source's order.
      file: the PNG to write.
      columns: number of columns.
      view_ratio: width over height at which images are shown, where they may be stored squeezed; None: square pixels.
    """
    if not answers:
        return
    images = _images(source, {answer.image for answer in answers})
    rows = -(-len(answers) // columns)
    height = 3.4 / (view_ratio or 1.0) + 1.3  # room for the answer above and three lines of question below
    figure = Figure(figsize=(3.6 * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(answers) :]:
        axis.axis("off")
    for axis, answer in zip(axes.flat, answers, strict=False):
        image = images[answer.image]
        stretch = 1.0 if view_ratio is None else image.width / image.height / view_ratio
        axis.imshow(image, aspect=stretch, interpolation="bilinear")
        axis.set_xticks([])
        axis.set_yticks([])
        prediction = (answer.prediction or "").strip() or "(nothing)"
        title = prediction if answer.correct else f"{prediction}   (right: {answer.reference})"
        # Texts may hold any character: a dollar sign does not start a formula.
        axis.set_title(drawable(title), fontsize=11, color="green" if answer.correct else "red", parse_math=False)
        axis.set_xlabel(drawable(textwrap.fill(answer.question, 44)), fontsize=9, parse_math=False)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def _images(source: RecordSource, keys: set[int | str]) -> dict[int | str, Image.Image]:
    """Returns the images with these indices or names, searched from the start of the source."""
    images: dict[int | str, Image.Image] = {}
    index = 0
    while len(images) < len(keys) and index < len(source):
        with contextlib.suppress(UserError, OSError):  # bad rows, see GuardedSource: they have no answer to show
            record = source[index]
            for key in {record.image_index, record.image_name} & keys - images.keys():
                images[key] = Image.open(io.BytesIO(record.image)).convert("RGB")
        index += 1
    return images
