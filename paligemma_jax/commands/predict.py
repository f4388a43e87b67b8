"""Answers prompts about images: python predict.py --workdir=DIR --image=x.png --prompt="How many red cubes are there?"

--image and --prompt may be given several times: as many of each, or one of either for all of the other. With
--model=PATH (a Hugging Face folder, a big_vision .npz, or "tiny") a base model answers. It gets the prompt as it is; a
run's model gets it in the template it was trained on (data.prompt). --config.KEY=VALUE changes a key of the run's
config, such as --config.compute_dtype=bfloat16. --tokenizer names a tokenizer that is not beside the model. Every
answer is one line; a newline inside one is written \\n.

A SigLIP or a CLIP classifies: python predict.py --model=DIR --image=x.png --class=cat --class=dog. It prints a line for
each image with the likelihood of each class; --template="a photo of a {}." is the text of a class (several make an
ensemble). A run of configs/coprompt.py (--workdir) classifies with its prompts, and by default its own template.

A run of configs/flow_clevr.py draws: python predict.py --workdir=DIR --prompt="a small red metal cube" --out=x.png (by
default DIR/drawn.png); --seed=1 draws another image, and --config.eval.guidance=2 follows the prompt more closely.

The installed `paligemma-jax predict` does the same.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from train_jax.config import command_line
from train_jax.core.errors import UserError


def _flags(values: flags.FlagValues) -> None:
    options: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "a run of train.py", **options)
    flags.DEFINE_string("model", None, "a base model instead of a run", **options)
    flags.DEFINE_string("tokenizer", None, "tokenizer.model or its folder; None = beside the model", **options)
    flags.DEFINE_string("checkpoint", "best", "of the run: best, latest or a step", **options)
    flags.DEFINE_multi_string("image", [], "image file", **options)
    flags.DEFINE_multi_string("prompt", [], "question or task, such as 'caption en'", **options)
    flags.DEFINE_multi_string("class", [], "for a SigLIP or CLIP: what an image may show", **options)
    flags.DEFINE_multi_string(
        "template", [], "prompt with {} for the class; {} alone, or the run's own, if absent", **options
    )
    flags.DEFINE_string("out", None, "for a run that draws: the PNG", **options)
    flags.DEFINE_integer("max_new_tokens", 64, "tokens to generate, at most", **options)
    flags.DEFINE_string("sampler", "greedy", "greedy, temperature, top_k, nucleus or beam", **options)
    flags.DEFINE_float("temperature", None, "of samplers temperature, top_k and nucleus", **options)
    flags.DEFINE_integer("top_k", None, "of sampler top_k: the number of most likely tokens", **options)
    flags.DEFINE_float("top_p", None, "of sampler nucleus: the probability mass kept", **options)
    flags.DEFINE_integer("num_beams", None, "of sampler beam: the number of hypotheses", **options)
    flags.DEFINE_float("length_penalty", None, "of sampler beam: exponent of the length", **options)
    flags.DEFINE_integer("seed", 0, "of the random numbers", **options)
    flags.DEFINE_string("special_tokens", None, "<bos> and such in prompts: refuse, or parse as tokens", **options)
    flags.DEFINE_string("dtype", None, "a base model's compute dtype (a run has its own); float32 if absent", **options)


def main(argv: list[str]) -> None:
    """Parses the flags, answers, and prints one line for each answer."""
    values, rest = command_line.read_flags(argv, __doc__, _flags, "Flags (--config.KEY=VALUE overrides a key of a run)")
    for line in _lines({name: values[name].value for name in values}, rest):
        print(line)


def _lines(given: dict[str, Any], rest: list[str]) -> Iterable[str]:
    """Returns the lines to print for flags by name; `rest` are overrides of a run's config."""
    if (given["workdir"] is None) == (given["model"] is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    # Slow to import: mistakes in the flags are reported first.
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
