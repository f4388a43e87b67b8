"""Answers prompts about image files with a base model or the model of a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.prompts import make_example, padded_length
from paligemma_jax.data.row_texts import check_prompt, is_text
from paligemma_jax.data.sources.splits import template_of
from paligemma_jax.data.tokenizers.paligemma import Tokenizer, load_tokenizer
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.token_sampling import make_sampler
from paligemma_jax.images.preprocessing import Preprocessing, preprocessing_of
from paligemma_jax.loading import load, load_run, run_config
from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError, cut, quoted

BATCH = 16  # prompts per batch
AS_GIVEN = {"prompt": "{question}", "special_tokens": "refuse"}
"""Values of keys of `config.data` for a base model, and for runs of tasks without these keys: prompts stay as given."""

_MAX_NAME = 1000  # characters of a file name that a message repeats


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
    """Returns a model's answer to every (image, prompt) pair.

    Args:
      images, texts: image files and prompts: equally many, or one of either for all of the other.
      workdir: a run, whose template wraps the prompts; or
      model: a base model, which gets the prompts unchanged.
      config: the run's config, if it should differ from config.json (compute_dtype, data.prompt).
      dtype: a base model's compute dtype, float32 if None; a run has its own.
      tokenizer: a tokenizer.model or its folder; None uses the one beside the model.
      checkpoint: which checkpoint of the run.
      max_new_tokens, sampler, seed, sampler_options: see generate.generate; row numbers continue from batch to batch,
        so that equal prompts get different random answers.
      special_tokens: treatment of <bos> and similar marks in prompts, "refuse" or "parse", see data.prompts.encode;
        None is the run's data.special_tokens, or "refuse".

    Returns:
      (image, prompt, answer), in the order given.

    Raises:
      UserError: an image that cannot be read, a prompt that is not text, neither or both of workdir and model, a model
        that is not a PaliGemma, or image and prompt counts that do not match.
    """
    source = _one_of(workdir, model)
    if workdir is not None and dtype is not None:
        raise UserError(f"dtype={dtype} is given with a run, which has its own: change config.compute_dtype instead.")
    images, texts = _pairs(images, texts)
    make_sampler(sampler, **sampler_options)  # refuses bad options before the model is read
    if workdir is None:
        settings, loaded = AS_GIVEN, load(source, dtype or "float32")
    else:
        config = config or run_config(workdir)
        settings = _prompt_settings(config)
        loaded = load_run(workdir, config, checkpoint)
    if not isinstance(loaded, PaliGemma):
        raise UserError(f"{source} is no PaliGemma, the only model that answers prompts: give classes with --class.")
    text_tokenizer = load_tokenizer(tokenizer or source)
    text_tokenizer.fits(loaded.config.decoder.vocab_size)
    preprocessing = preprocessing_of(loaded.config)
    pixels = {image: read_pixels(image, preprocessing) for image in dict.fromkeys(images)}
    prompts = [settings["prompt"].replace("{question}", text) for text in texts]
    rows = _prompt_rows(text_tokenizer, prompts, special_tokens or settings["special_tokens"])
    rows = [row | {"image": pixels[image]} for image, row in zip(images, rows, strict=True)]
    options = dict(max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, **sampler_options)
    return list(zip(images, texts, _answers(loaded, rows, text_tokenizer, options), strict=True))


def _answers(
    model: PaliGemma, rows: list[dict[str, np.ndarray]], tokenizer: Tokenizer, options: dict[str, Any]
) -> list[str]:
    """Returns the generated text of each row, which has an image, tokens and their mask; `options` as of generate."""
    answers = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        images, tokens, mask = (np.stack([row[name] for row in part]) for name in ("image", "tokens", "mask_input"))
        new_tokens = generate(model, images, tokens, mask, eos_id=tokenizer.eos_id, first_row=start, **options)
        answers += [tokenizer.decode(row.tolist()) for row in np.asarray(new_tokens)]
    return answers


def _one_of(workdir: str | None, model: str | None) -> str:
    """Returns the path that is given. Raises UserError for none or both."""
    paths = [path for path in (workdir, model) if path is not None]
    if len(paths) != 1:
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    return paths[0]


def _pairs(images: Sequence[str], texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns equally long lists of images and prompts; a single one of either is repeated. Raises UserError."""
    for given, name in ((images, "images"), (texts, "texts")):
        if isinstance(given, str | bytes | os.PathLike):
            raise UserError(f"{name} are {quoted(given)}, expected a list: put it into one.")
    if not images or not texts or (len(images) != len(texts) and 1 not in (len(images), len(texts))):
        raise UserError(
            f"found {len(images)} image(s) and {len(texts)} prompt(s), expected as many of each, or one of either: add "
            "--image or --prompt."
        )
    for text in texts:
        check_prompt(text, "the prompt")
    count = max(len(images), len(texts))
    return _repeated(images, count), _repeated(texts, count)


def _repeated(values: Sequence[str], count: int) -> list[str]:
    return list(values) * (count if len(values) == 1 else 1)


def _prompt_settings(config: ConfigDict) -> dict[str, str]:
    """Returns a run's values of the keys of AS_GIVEN, and its own where the run's task does not have them."""
    own = {"prompt": template_of(config.data), "special_tokens": config.data.get("special_tokens")}
    return AS_GIVEN | {name: value for name, value in own.items() if value is not None}


def _prompt_rows(tokenizer: Tokenizer, prefixes: list[str], special_tokens: str) -> list[dict[str, np.ndarray]]:
    """Returns tokens and masks of prompts, all padded to one of the lengths of `padded_length`."""
    longest = max(len(tokenizer.encode(prefix)) for prefix in prefixes) + 1 + len(tokenizer.separator_ids)
    length = padded_length(longest)
    return [make_example(tokenizer, prefix, None, length, special_tokens=special_tokens) for prefix in prefixes]


def read_pixels(file: str, prepare: Preprocessing) -> np.ndarray:
    """Returns an image file as model input, float32 [I, I, 3]. Raises UserError."""
    name = cut(file, _MAX_NAME) if is_text(file) and file.isprintable() else quoted(file)
    try:
        data = Path(file).expanduser().read_bytes()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # no such file, or a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read ({reason}): correct --image.") from error
    try:
        return prepare.apply(prepare.decode(data))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
