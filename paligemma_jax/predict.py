"""Answers to prompts about image files, by a base model or the model of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.data.prompts import make_example
from paligemma_jax.data.row_texts import check_prompt, is_text
from paligemma_jax.data.tokenizer import load_tokenizer
from paligemma_jax.generate import generate
from paligemma_jax.loading import load, load_run, run_config
from paligemma_jax.sampling import make_sampler
from train_jax.errors import UserError, cut, quoted

BATCH = 16  # prompts answered at once
_PATH = 1000  # characters of a file that a message repeats


def predict(
    images: Sequence[str],
    texts: Sequence[str],
    *,
    workdir: str | None = None,
    model: str | None = None,
    config: ConfigDict | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    checkpoint: str = "best",
    max_new_tokens: int = 64,
    sampler: str = "greedy",
    seed: int = 0,
    special_tokens: str | None = None,
    **sampler_options: int | float | None,
) -> list[tuple[str, str, str]]:
    """Answers every (image, prompt) pair.

    Args:
      images, texts: image files and prompts: as many of each, or one of either for all of the other.
      workdir: a run, whose template wraps the prompts; or
      model: a base model, which gets the prompts as they are.
      config: of the run, where it is to differ from its config.json (compute_dtype, data.prompt).
      dtype: a base model's compute dtype, float32 if None; a run has its own.
      tokenizer: a tokenizer.model or its folder; None is the one beside the model.
      checkpoint: of the run.
      max_new_tokens, sampler, seed, sampler_options: see generate.generate; row numbers go on from batch to batch, so
        that equal prompts draw answers of their own.
      special_tokens: what becomes of <bos> and such in prompts, "refuse" or "parse", see data.prompts.encode; None is
        the run's data.special_tokens, or "refuse".

    Returns:
      (image, prompt, answer), in the order given.

    Raises:
      UserError: an image that cannot be read, a prompt that is no text, neither or both of workdir and model, numbers
        that do not pair up.
    """
    if (workdir is None) == (model is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    if workdir is not None and dtype is not None:
        raise UserError(f"dtype={dtype} is given with a run, which has its own: change config.compute_dtype instead.")
    if not images or not texts or (len(images) != len(texts) and 1 not in (len(images), len(texts))):
        raise UserError(
            f"found {len(images)} image(s) and {len(texts)} prompt(s), expected as many of each, or one of either: add "
            "--image or --prompt."
        )
    for text in texts:
        check_prompt(text, "the prompt")
    count = max(len(images), len(texts))
    images, texts = (list(given) * (count if len(given) == 1 else 1) for given in (images, texts))
    make_sampler(sampler, **sampler_options)  # tells of a mistake before the model is read
    if workdir is None:
        prompt, loaded = "{question}", load(model, dtype or "float32")
        special_tokens = special_tokens or "refuse"
    else:
        config = config or run_config(workdir)
        # Rows of a JSONL file bring whole prompts.
        prompt = "{question}" if config.data.name == "jsonl" else config.data.prompt
        special_tokens = special_tokens or config.data.get("special_tokens", "refuse")
        loaded = load_run(workdir, config, checkpoint)
    words, prepare = load_tokenizer(tokenizer or workdir or model), loaded.config.preprocessing
    words.fits(loaded.config.decoder.vocab_size)
    pixels = {image: read_pixels(image, prepare) for image in dict.fromkeys(images)}
    prefixes = [prompt.replace("{question}", text) for text in texts]
    longest = max(len(words.encode(prefix)) for prefix in prefixes) + 1 + len(words.separator_ids)
    rows = [make_example(words, prefix, None, longest, special_tokens=special_tokens) for prefix in prefixes]
    answers = []
    for start in range(0, count, BATCH):
        part = slice(start, start + BATCH)
        tokens = generate(
            loaded,
            np.stack([pixels[image] for image in images[part]]),
            np.stack([row["tokens"] for row in rows[part]]),
            np.stack([row["mask_input"] for row in rows[part]]),
            max_new_tokens,
            words.eos_id,
            sampler,
            seed,
            first_row=start,
            **sampler_options,
        )
        answers += [words.decode(row.tolist()) for row in np.asarray(tokens)]
    return list(zip(images, texts, answers, strict=True))


def read_pixels(file: str, prepare: Preprocessing) -> np.ndarray:
    """An image file as the model takes it, float32 [I, I, 3]. Raises UserError."""
    name = cut(file, _PATH) if is_text(file) and file.isprintable() else quoted(file)
    try:
        data = Path(file).expanduser().read_bytes()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # no such file, or no name that a file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read ({reason}): correct --image.") from error
    try:
        return prepare.apply(prepare.decode(data))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
