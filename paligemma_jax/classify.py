"""Zero-shot classification of image files by a SigLIP or a CLIP.

    python predict.py --model=siglip-base-patch16-224 --image=x.png --class=cat --class=dog --template="a {}."
    python -m paligemma_jax.classify siglip-base-patch16-224 my_images --template="a photo of a {}."

The second measures accuracy on a folder of class folders, `my_images/golden retriever/0001.jpg`: their names are the
classes, with spaces for underscores.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float

from paligemma_jax import zero_shot
from paligemma_jax.data.text_tokens import load_text_tokenizer
from paligemma_jax.loading import load
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.predict import read_pixels
from paligemma_jax.tasks.common import progress
from train_jax import command_line
from train_jax.errors import UserError

BATCH = 32  # images embedded at once
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def classify(
    images: Sequence[str | Path],
    classes: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    model: str | Path,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    checkpoint: str = "best",
    told=None,
) -> Float[np.ndarray, "N C"]:
    """How likely each class is for each image file.

    Args:
      images: files, N of them.
      classes, templates: see zero_shot.class_embeddings; a prompt ensemble has several templates.
      model: a SigLIP or CLIP that `pg.load` reads, the workdir of a run too.
      tokenizer: its folder or file; None is what lies beside the model.
      dtype: compute dtype.
      checkpoint: of a run.
      told: called with images done and images in all.

    Returns:
      Of a SigLIP the sigmoid of every pair's logit: each class on its own, no need to add to one. Of a CLIP the softmax
      over the classes. float32.

    Raises:
      UserError: no dual encoder, no class, or an image that cannot be read.
    """
    if not images:
        raise UserError("no image is given to classify: add --image.")
    options = {"which": checkpoint} if checkpoint != "best" else {}
    encoder = load(model, dtype, **options)
    if not isinstance(encoder, DualEncoder):
        raise UserError(f"{model} is no SigLIP or CLIP, which classes are compared with: leave them out, or give one.")
    words = load_text_tokenizer(tokenizer or model, encoder.config.text.length)
    words.fits(encoder.config.text.vocab_size)
    texts = jnp.asarray(zero_shot.class_embeddings(encoder, words, classes, templates))
    step = jax.jit(lambda encoder, pixels, texts: encoder.logits(encoder.encode_image(pixels)[0], texts))
    logits = []
    for start in range(0, len(images), BATCH):
        part = [images[min(index, len(images) - 1)] for index in range(start, start + min(BATCH, len(images)))]
        pixels = np.stack([read_pixels(str(file), encoder.config.preprocessing) for file in part])
        logits.append(np.asarray(step(encoder, pixels, texts)))
        if told is not None:
            told(min(start + BATCH, len(images)), len(images))
    found = jnp.asarray(np.concatenate(logits)[: len(images)])
    return np.asarray(jax.nn.softmax(found) if encoder.logit_bias is None else jax.nn.sigmoid(found))


def class_folders(folder: str | Path) -> dict[str, list[Path]]:
    """The image files of a folder of class folders, by class; both in the order of their names.

    Raises:
      UserError: fewer than two folders with images.
    """
    root = Path(folder).expanduser()
    found = {}
    for place in sorted(root.iterdir()) if root.is_dir() else ():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS) if place.is_dir() else []
        if files:
            found[place.name.replace("_", " ")] = files
    if len(found) < 2:
        raise UserError(
            f"{folder} holds {len(found)} folder(s) with images ({', '.join(ENDINGS)}), expected one a class, two at "
            "least: correct the path."
        )
    return found


def accuracies(scores: Float[np.ndarray, "N C"], right: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """`accuracy` of all images, `mean_class_accuracy`, and every class's own by name."""
    hits = scores.argmax(1) == right
    own = {name: float(hits[right == number].mean()) for number, name in enumerate(names)}
    return {"accuracy": float(hits.mean()), "mean_class_accuracy": float(np.mean(list(own.values()))), **own}


def main(argv: Sequence[str]) -> None:
    """Command line: accuracy on a folder of class folders."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_multi_string("template", ["{}"], "prompt with {} for the class; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "its folder; None = beside the model", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "compute dtype", flag_values=values)
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    try:
        places = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{error}: correct the flag") from error
    if values.help:
        print(f"{__doc__.strip()}\n\nFlags:\n{values.get_help()}")
        return
    if len(places) != 2:
        raise UserError(f"found {len(places)} place(s), expected MODEL FOLDER: see --help.")
    model, folder = places
    found = class_folders(folder)
    files = [file for group in found.values() for file in group]
    right = np.repeat(np.arange(len(found)), [len(group) for group in found.values()])
    with progress("classifying") as told:
        options = dict(model=model, tokenizer=values.tokenizer, dtype=values.dtype, told=told)
        scores = classify(files, list(found), values.template, **options)
    for name, value in accuracies(scores, right, list(found)).items():
        print(f"{name:>30}  {value:.4f}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
