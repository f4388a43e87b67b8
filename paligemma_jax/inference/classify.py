"""Classifies image files zero-shot with a SigLIP or a CLIP: `predict.py --class=cat --class=dog`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from paligemma_jax import zero_shot
from paligemma_jax.adapt.few_shot.learned_prompts import check_texts
from paligemma_jax.data.few_shot.descriptions import fill_templates
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.inference.answer import read_pixels
from paligemma_jax.loading import is_run, load, load_run, run_config
from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.errors import UserError

BATCH = 32  # images per batch
BARE_NAME = "{}"  # template of a text that is the name of the class


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
    on_progress: Callable[[int, int], object] | None = None,
) -> Float[np.ndarray, "N C"]:
    """Returns the likelihood of each class for each image file.

    Args:
      images: N files.
      classes, templates: see zero_shot.class_embeddings; a prompt ensemble has several templates. None: the template
        that a few-shot run was tuned with, else the bare class name.
      model: a SigLIP or CLIP that `pg.load` reads, or the workdir of a run.
      tokenizer: its folder or file; None uses the one beside the model.
      config: the run's config, if it should differ from config.json.
      dtype: compute dtype, float32 if None.
      checkpoint: which checkpoint of a run.
      on_progress: called with the number of images done and the total.

    Returns:
      For a SigLIP, the sigmoid of every pair's logit: classes are independent and need not sum to one. For a CLIP, the
      softmax over the classes. float32.

    Raises:
      UserError: not a dual encoder, no class, an image that cannot be read, or texts that learned prompts would cut.
    """
    if not images:
        raise UserError("no image is given to classify: add --image.")
    if is_run(model):
        config = config or run_config(model)
        config.compute_dtype = dtype or "float32"
        encoder = load_run(model, config, checkpoint)
        template = config.template if "template" in config else BARE_NAME  # only few-shot runs have one
    else:
        options = {"which": checkpoint} if checkpoint != "best" else {}
        encoder, template = load(model, dtype or "float32", **options), BARE_NAME
    if not isinstance(encoder, DualEncoder):
        raise UserError(f"{model} is no SigLIP or CLIP, which --class needs: give one, or leave --class out.")
    text_tokenizer = load_text_tokenizer(tokenizer or model, encoder.config.text.length)
    text_tokenizer.fits(encoder.config.text.vocab_size)
    templates = templates or (template,)
    prompts = [prompt for group in fill_templates(classes, templates) for prompt in group]
    check_texts(encoder, text_tokenizer(prompts)[0])
    texts = jnp.asarray(zero_shot.class_embeddings(encoder, text_tokenizer, classes, templates))
    preprocessing = preprocessing_of(encoder.config)
    batches = []
    for start in range(0, len(images), BATCH):
        part = [images[min(index, len(images) - 1)] for index in range(start, start + min(BATCH, len(images)))]
        pixels = np.stack([read_pixels(str(file), preprocessing) for file in part])
        batches.append(np.asarray(_logits(encoder, jnp.asarray(pixels), texts)))
        if on_progress is not None:
            on_progress(min(start + BATCH, len(images)), len(images))
    logits = jnp.asarray(np.concatenate(batches)[: len(images)])
    return np.asarray(jax.nn.softmax(logits) if encoder.logit_bias is None else jax.nn.sigmoid(logits))


@jax.jit
def _logits(encoder: DualEncoder, pixels: Float[Array, "B I I 3"], texts: Float[Array, "C E"]) -> Float[Array, "B C"]:
    return encoder.logits(encoder.encode_image(pixels)[0], texts)
