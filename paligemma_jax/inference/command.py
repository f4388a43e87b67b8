"""Formats the output of predict.py: one line per answer, or per image with the likelihood of each class.

predict.py calls it for base models, and tasks call it for runs (`Task.predict`). `flags` are those of predict.py by
name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.inference import answer
from paligemma_jax.inference.classify import classify
from train_jax.core.errors import UserError, quoted

SAMPLER_OPTIONS = ("temperature", "top_k", "top_p", "num_beams", "length_penalty", "draft_tokens")
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r"})


def answer_lines(flags: Mapping[str, Any], **model_or_run: Any) -> Iterator[str]:
    """Yields one line per (image, prompt) pair with the answer.

    Args:
      flags: images, prompts and sampling options.
      model_or_run: `model`, or `workdir` and `config`, as for answer.predict.

    Raises:
      UserError: classes or an output file are given; as answer.predict.
    """
    if flags["class"]:
        raise UserError(
            f"--class={flags['class'][0]} is given to a model that answers prompts, expected a SigLIP or a CLIP: ask "
            "with --prompt."
        )
    refuse_out(flags)
    options = {name: flags[name] for name in ("dtype", "tokenizer", "checkpoint", "max_new_tokens", "sampler", "seed")}
    options |= {name: flags[name] for name in ("special_tokens", *SAMPLER_OPTIONS)}
    for image, prompt, text in answer.predict(flags["image"], flags["prompt"], **model_or_run, **options):
        yield f"{image}  {prompt}  ->  {text}".translate(_ESCAPES)


def class_lines(flags: Mapping[str, Any], model: str, config: ConfigDict | None = None) -> Iterator[str]:
    """Yields one line per image with the likelihood of every class.

    Args:
      flags: images, classes and templates.
      model: a SigLIP or a CLIP, or the workdir of a run.
      config: the run's config with the changes of the command line.

    Raises:
      UserError: prompts, no class, or an output file; as classify.classify.
    """
    if flags["prompt"]:
        raise UserError(f"found {quoted(flags['prompt'][0])} beside --class, expected no prompt: leave one out.")
    if not flags["class"]:
        raise UserError("the model compares images with classes, and none is named: add --class.")
    refuse_out(flags)
    classes, options = flags["class"], {name: flags[name] for name in ("tokenizer", "dtype", "checkpoint")}
    scores = classify(flags["image"], classes, flags["template"] or None, model=model, config=config, **options)
    for image, row in zip(flags["image"], scores, strict=True):
        likely = "  ".join(f"{name} {value:.3f}" for name, value in zip(classes, row, strict=True))
        yield f"{image}  {likely}".translate(_ESCAPES)


def refuse_out(flags: Mapping[str, Any]) -> None:
    """Raises UserError if an output file is given, which only flow runs write."""
    if flags["out"] is not None:
        raise UserError(f"--out={flags['out']} is given, but only runs of configs/flow_clevr.py draw: leave it out.")
