"""Answers to prompts about image files, by a base model or the model of a run."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.prompts import make_example
from paligemma_jax.data.row_texts import check_prompt, is_text
from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.token_sampling import make_sampler
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.loading import load, load_run, run_config
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError, cut, quoted

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
      UserError: an image that cannot be read, a prompt that is no text, neither or both of workdir and model, one that
        is no PaliGemma, numbers that do not pair up.
    """
    if (workdir is None) == (model is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    if workdir is not None and dtype is not None:
        raise UserError(f"dtype={dtype} is given with a run, which has its own: change config.compute_dtype instead.")
    images, texts = _pairs(images, texts)
    make_sampler(sampler, **sampler_options)  # tells of a mistake before the model is read
    if workdir is None:
        prompt, marks, loaded = "{question}", "refuse", load(model, dtype or "float32")
    else:
        config = config or run_config(workdir)
        prompt, marks = _wording(config)
        loaded = load_run(workdir, config, checkpoint)
    if not isinstance(loaded, PaliGemma):
        raise UserError(f"{workdir or model} is no PaliGemma, which alone answers prompts: name classes with --class.")
    words = load_tokenizer(tokenizer or workdir or model)
    words.fits(loaded.config.decoder.vocab_size)
    pixels = {image: read_pixels(image, loaded.config.preprocessing) for image in dict.fromkeys(images)}
    rows = _prompt_rows(words, [prompt.replace("{question}", text) for text in texts], special_tokens or marks)
    answers = []
    for start in range(0, len(images), BATCH):
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


def _pairs(images: Sequence[str], texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """As many images as prompts, one of either repeated. Raises UserError."""
    for given, what in ((images, "images"), (texts, "texts")):
        if isinstance(given, str | bytes | os.PathLike):
            raise UserError(f"{what} are {quoted(given)}, expected several: give a list, of one if need be.")
    if not images or not texts or (len(images) != len(texts) and 1 not in (len(images), len(texts))):
        raise UserError(
            f"found {len(images)} image(s) and {len(texts)} prompt(s), expected as many of each, or one of either: add "
            "--image or --prompt."
        )
    for text in texts:
        check_prompt(text, "the prompt")
    count = max(len(images), len(texts))
    return tuple(list(given) * (count if len(given) == 1 else 1) for given in (images, texts))


def _wording(config: ConfigDict) -> tuple[str, str]:
    """The template of a run's prompts, and what becomes of special tokens in them; rows of JSONL are whole prompts."""
    template = "{question}" if config.data.get("name") == "jsonl" else config.data.get("prompt", "{question}")
    return template, config.data.get("special_tokens", "refuse")


def _prompt_rows(words: Tokenizer, prefixes: list[str], special_tokens: str) -> list[dict[str, np.ndarray]]:
    """Tokens and masks of prompts, all as long as the longest."""
    longest = max(len(words.encode(prefix)) for prefix in prefixes) + 1 + len(words.separator_ids)
    return [make_example(words, prefix, None, longest, special_tokens=special_tokens) for prefix in prefixes]


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
