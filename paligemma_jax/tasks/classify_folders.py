"""Zero-shot accuracy of a SigLIP or a CLIP on a folder of class folders:

    python -m paligemma_jax.tasks.classify_folders siglip-base-patch16-224 my_images --template="a photo of a {}."

`my_images/golden_retriever/0001.jpg`: the folders' names are the classes, with spaces for underscores.
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float

from paligemma_jax.data.few_shot.class_folders import class_folders
from paligemma_jax.inference.classify import classify
from paligemma_jax.tasks.common import progress
from train_jax.config import command_line


def accuracies(scores: Float[np.ndarray, "N C"], right: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """`accuracy` of all images, `mean_class_accuracy`, and every class's own by name."""
    hits = scores.argmax(1) == right
    own = {name: float(hits[right == number].mean()) for number, name in enumerate(names)}
    return {"accuracy": float(hits.mean()), "mean_class_accuracy": float(np.mean(list(own.values()))), **own}


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("template", ["{}"], "prompt with {} for the class; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "its folder; None = beside the model", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "compute dtype", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Command line: accuracy on a folder of class folders."""
    places, values = command_line.parse(argv, __doc__, _flags, "MODEL FOLDER")
    model, folder = places
    found = class_folders(folder)
    files = [file for group in found.values() for file in group]
    right = np.repeat(np.arange(len(found)), [len(group) for group in found.values()])
    with progress("classifying") as told:
        options = dict(model=model, tokenizer=values.tokenizer, dtype=values.dtype, on_progress=told)
        scores = classify(files, list(found), values.template, **options)
    for name, value in accuracies(scores, right, list(found)).items():
        print(f"{name:>30}  {value:.4f}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
