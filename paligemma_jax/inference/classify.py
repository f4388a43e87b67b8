"""Zero-shot classification of image files by a SigLIP or a CLIP: `predict.py --class=cat --class=dog`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from paligemma_jax import zero_shot
from paligemma_jax.adapt.few_shot.prompts import check_texts
from paligemma_jax.data.few_shot.descriptions import fill_templates
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.inference.answer import read_pixels
from paligemma_jax.loading import is_run, load, load_run, run_config
from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.errors import UserError

BATCH = 32  # images embedded at once


def classify(
    images: Sequence[str | Path],
    classes: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    model: str | Path,
    config: ConfigDict | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    checkpoint: str = "best",
    told=None,
) -> Float[np.ndarray, "N C"]:
    """How likely each class is for each image file.

    Args:
      images: files, N of them.
      classes, templates: see zero_shot.class_embeddings; a prompt ensemble has several templates. None: of a few-shot
        run that which it was tuned with, else the class alone.
      model: a SigLIP or CLIP that `pg.load` reads, the workdir of a run too.
      tokenizer: its folder or file; None is what lies beside the model.
      config: of a run, where it is to differ from its config.json.
      dtype: compute dtype, float32 if None.
      checkpoint: of a run.
      told: called with images done and images in all.

    Returns:
      Of a SigLIP the sigmoid of every pair's logit: each class on its own, no need to add to one. Of a CLIP the softmax
      over the classes. float32.

    Raises:
      UserError: no dual encoder, no class, an image that cannot be read, or texts that learned prompts would spoil.
    """
    if not images:
        raise UserError("no image is given to classify: add --image.")
    if is_run(model):
        config = config or run_config(model)
        config.compute_dtype = dtype or "float32"
        encoder, template = load_run(model, config, checkpoint), config.get("template", "{}")  # of a few-shot run
    else:
        options = {"which": checkpoint} if checkpoint != "best" else {}
        encoder, template = load(model, dtype or "float32", **options), "{}"
    if not isinstance(encoder, DualEncoder):
        raise UserError(f"{model} is no SigLIP or CLIP, which classes are compared with: leave them out, or give one.")
    words = load_text_tokenizer(tokenizer or model, encoder.config.text.length)
    words.fits(encoder.config.text.vocab_size)
    templates = templates or (template,)
    prompts = [prompt for group in fill_templates(classes, templates) for prompt in group]
    check_texts(encoder, words(prompts)[0])
    texts = jnp.asarray(zero_shot.class_embeddings(encoder, words, classes, templates))
    logits = []
    for start in range(0, len(images), BATCH):
        part = [images[min(index, len(images) - 1)] for index in range(start, start + min(BATCH, len(images)))]
        pixels = np.stack([read_pixels(str(file), encoder.config.preprocessing) for file in part])
        logits.append(np.asarray(_logits(encoder, pixels, texts)))
        if told is not None:
            told(min(start + BATCH, len(images)), len(images))
    found = jnp.asarray(np.concatenate(logits)[: len(images)])
    return np.asarray(jax.nn.softmax(found) if encoder.logit_bias is None else jax.nn.sigmoid(found))


@jax.jit
def _logits(encoder: DualEncoder, pixels: Float[Array, "B I I 3"], texts: Float[Array, "C E"]) -> Float[Array, "B C"]:
    return encoder.logits(encoder.encode_image(pixels)[0], texts)
