"""Answers prompts about images: python predict.py --workdir=DIR --image=x.png --prompt="How many red cubes are there?"

--image and --prompt may be given several times: as many of each, or one of either for all of the other. With
--model=PATH (a Hugging Face folder, a big_vision .npz, or "tiny") a base model answers; it gets the prompt as it is, a
run's model gets it in the template it was trained on (data.prompt). --config.KEY=VALUE changes a key of the run's
config, such as --config.compute_dtype=bfloat16. A tokenizer that does not lie beside the model is named by --tokenizer.
Every answer is one line; a newline inside one is written \\n.

A SigLIP or a CLIP classifies: python predict.py --model=DIR --image=x.png --class=cat --class=dog. Every image is one
line with the likelihood of each class; --template="a photo of a {}." (several make an ensemble) says how classes are
written. A run of configs/coprompt.py (--workdir) does so with its prompts, and its own template by default.

A run of configs/flow_clevr.py draws: python predict.py --workdir=DIR --prompt="a small red metal cube" --out=x.png (by
default DIR/drawn.png); --seed=1 draws another, --config.eval.guidance=2 follows the prompt more closely.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from train_jax.config import command_line
from train_jax.core.errors import UserError


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    options = dict(flag_values=values)
    flags.DEFINE_string("workdir", None, "a run of train.py", **options)
    flags.DEFINE_string("model", None, "a base model instead of a run", **options)
    flags.DEFINE_string("tokenizer", None, "tokenizer.model or its folder; None = beside the model", **options)
    flags.DEFINE_string("checkpoint", "best", "of the run: best, latest or a step", **options)
    flags.DEFINE_multi_string("image", [], "image file", **options)
    flags.DEFINE_multi_string("prompt", [], "question or task, such as 'caption en'", **options)
    flags.DEFINE_multi_string("class", [], "of a SigLIP or CLIP: what an image may show", **options)
    flags.DEFINE_multi_string(
        "template", [], "prompt with {} for the class; {} alone, or the run's own, if absent", **options
    )
    flags.DEFINE_string("out", None, "of a run that draws: the PNG", **options)
    flags.DEFINE_integer("max_new_tokens", 64, "tokens to generate, at most", **options)
    flags.DEFINE_string("sampler", "greedy", "greedy, temperature, top_k, nucleus or beam", **options)
    flags.DEFINE_float("temperature", None, "of samplers temperature, top_k and nucleus", **options)
    flags.DEFINE_integer("top_k", None, "sampler top_k: how many of the likeliest words", **options)
    flags.DEFINE_float("top_p", None, "sampler nucleus: the mass kept", **options)
    flags.DEFINE_integer("num_beams", None, "sampler beam: how many hypotheses", **options)
    flags.DEFINE_float("length_penalty", None, "sampler beam: exponent of the length", **options)
    flags.DEFINE_integer("seed", 0, "of the draws", **options)
    flags.DEFINE_string("special_tokens", None, "<bos> and such in prompts: refuse, or parse as tokens", **options)
    flags.DEFINE_string("dtype", None, "a base model's compute dtype (a run has its own); float32 if absent", **options)
    flags.DEFINE_bool("help", False, "print this", **options)
    return values


def main(argv: list[str]) -> None:
    """Parses the flags, answers, prints one line an answer."""
    values = _flags()
    try:
        rest = values(list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise UserError(f"{error}: correct the flag") from error
    if values.help:
        print(f"{__doc__.strip()}\n\nFlags:\n{command_line.flags_help(values)}")
        return
    for line in _lines({name: values[name].value for name in values}, rest):
        print(line)


def _lines(given: dict[str, Any], rest: list[str]) -> Iterable[str]:
    """What is printed for flags by name; `rest` are overrides of a run's config."""
    if (given["workdir"] is None) == (given["model"] is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    # Slow to import: after mistakes in the flags have been told.
    if given["model"] is not None:
        from paligemma_jax.inference import command

        command_line.parse_overrides(rest, ConfigDict(), list(given))
        lines = command.class_lines if given["class"] else command.answer_lines
        return lines(given, model=given["model"])
    from paligemma_jax.loading import run_config
    from train_jax.config.base import task_class

    config = run_config(given["workdir"])
    command_line.override(config, command_line.parse_overrides(rest, config, list(given)))
    return task_class(config.task).predict(config, given["workdir"], given)


if __name__ == "__main__":
    command_line.run(main)
