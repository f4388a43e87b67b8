"""What predict.py prints: one line an answer, or an image with the likelihood of each class.

Used for base models by predict.py itself and for runs by their tasks (`Task.predict`). `flags` are those of predict.py
by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.inference import answer
from paligemma_jax.inference.classify import classify
from train_jax.core.errors import UserError, quoted

SAMPLER_OPTIONS = ("temperature", "top_k", "top_p", "num_beams", "length_penalty")
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r"})


def answer_lines(flags: Mapping[str, Any], **places: Any) -> Iterator[str]:
    """Answers every (image, prompt) pair.

    Args:
      flags: images and prompts, and how tokens are picked.
      places: `model`, or `workdir` and `config`, of answer.predict.

    Raises:
      UserError: classes, or a file to draw into; as answer.predict.
    """
    if flags["class"]:
        raise UserError(
            f"--class={flags['class'][0]} is given to a model that answers prompts, expected a SigLIP or a CLIP: ask "
            "with --prompt."
        )
    refuse_out(flags)
    options = {name: flags[name] for name in ("dtype", "tokenizer", "checkpoint", "max_new_tokens", "sampler", "seed")}
    options |= {name: flags[name] for name in ("special_tokens", *SAMPLER_OPTIONS)}
    for image, prompt, text in answer.predict(flags["image"], flags["prompt"], **places, **options):
        yield f"{image}  {prompt}  ->  {text}".translate(_ESCAPES)


def class_lines(flags: Mapping[str, Any], model: str, config: ConfigDict | None = None) -> Iterator[str]:
    """The likelihood of every class, one line an image.

    Args:
      flags: images, classes and templates.
      model: a SigLIP or a CLIP, or the workdir of a run.
      config: of the run, with what the command line changes.

    Raises:
      UserError: prompts, no class, or a file to draw into; as classify.classify.
    """
    if flags["prompt"]:
        raise UserError(f"found {quoted(flags['prompt'][0])} beside --class, which goes without: leave one out.")
    if not flags["class"]:
        raise UserError("the model compares images with classes, and none is named: add --class.")
    refuse_out(flags)
    classes, options = flags["class"], {name: flags[name] for name in ("tokenizer", "dtype", "checkpoint")}
    scores = classify(flags["image"], classes, flags["template"] or None, model=model, config=config, **options)
    for image, row in zip(flags["image"], scores, strict=True):
        likely = "  ".join(f"{name} {value:.3f}" for name, value in zip(classes, row, strict=True))
        yield f"{image}  {likely}".translate(_ESCAPES)


def refuse_out(flags: Mapping[str, Any]) -> None:
    """Raises UserError for a file to draw into."""
    if flags["out"] is not None:
        raise UserError(f"--out={flags['out']} is given, but only runs of configs/flow_clevr.py draw: leave it out.")
