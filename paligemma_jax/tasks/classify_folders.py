"""Measures the zero-shot accuracy of a SigLIP or a CLIP on a folder of class folders.

    python -m paligemma_jax.tasks.classify_folders siglip-base-patch16-224 my_images --template="a photo of a {}."

The names of the class folders are the classes, with spaces for underscores: my_images/golden_retriever/0001.jpg.
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from paligemma_jax.data.few_shot.class_folders import class_folders
from paligemma_jax.inference.classify import classify
from paligemma_jax.tasks.common import progress
from train_jax.config import command_line


def accuracies(
    scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], names: Sequence[str]
) -> dict[str, float]:
    """Returns `accuracy` over all images, `mean_class_accuracy`, and the accuracy of every class by its name."""
    hits = scores.argmax(1) == labels
    by_class = {name: float(hits[labels == number].mean()) for number, name in enumerate(names)}
    return {"accuracy": float(hits.mean()), "mean_class_accuracy": float(np.mean(list(by_class.values()))), **by_class}


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("template", ["{}"], "prompt with {} for the class; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "its folder; None = beside the model", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "compute dtype", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    (model, folder), values = command_line.parse(argv, __doc__ or "", _flags, "MODEL FOLDER")
    images_by_class = class_folders(folder)
    names = list(images_by_class)
    files = [file for images in images_by_class.values() for file in images]
    labels = np.repeat(np.arange(len(names)), [len(images) for images in images_by_class.values()])
    with progress("classifying") as on_progress:
        scores = classify(
            files,
            names,
            values.template,
            model=model,
            tokenizer=values.tokenizer,
            dtype=values.dtype,
            on_progress=on_progress,
        )
    for name, value in accuracies(scores, labels, names).items():
        print(f"{name:>30}  {value:.4f}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
