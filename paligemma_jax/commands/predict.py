r"""Answers prompts about images, classifies images, or generates images.

    python predict.py --workdir=DIR --image=x.png --prompt="How many red cubes are there?"

Give --image and --prompt equally often, or one of them once to use it with all of the other. --model=PATH (a Hugging
Face folder, a big_vision .npz, or "tiny") uses a base model instead of a run. A base model receives the prompt
unchanged; a run's model receives it in the template of its training (data.prompt). --config.KEY=VALUE changes a key of
the run's config, such as --config.compute_dtype=bfloat16. --tokenizer names a tokenizer that is not in the model's
folder. Prints one line for each answer, with newlines inside an answer written as \n.

    python predict.py --model=DIR --image=x.png --class=cat --class=dog

classifies images with a SigLIP or CLIP model. Prints one line for each image, with the likelihood of each class.
--template="a photo of a {}." sets the prompt for a class; several templates form an ensemble. A run of
configs/coprompt.py (--workdir) classifies with its learned prompts and, by default, its own template.

    python predict.py --workdir=DIR --prompt="a small red metal cube" --out=x.png

generates images with a run of configs/flow_clevr.py (--out defaults to DIR/drawn.png). --seed=1 changes the noise;
--config.eval.guidance=2 follows the prompt more closely.

The installed `paligemma-jax predict` does the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.system import compilation_cache


def _flags(values: flags.FlagValues) -> None:
    options: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "a run of train.py", **options)
    flags.DEFINE_string("model", None, "a base model instead of a run", **options)
    flags.DEFINE_string("tokenizer", None, "tokenizer.model or its folder; the model's folder if absent", **options)
    flags.DEFINE_string("checkpoint", "best", "the run's checkpoint: best, latest or a step", **options)
    flags.DEFINE_multi_string("image", [], "image file", **options)
    flags.DEFINE_multi_string("prompt", [], "question or task, such as 'caption en'", **options)
    flags.DEFINE_multi_string("class", [], "class name, for a SigLIP or CLIP model", **options)
    flags.DEFINE_multi_string(
        "template", [], "prompt with {} for the class; the run's own or {} alone if absent", **options
    )
    flags.DEFINE_string("out", None, "the PNG to write, for a run that generates images", **options)
    flags.DEFINE_integer("max_new_tokens", 64, "maximum number of tokens to generate", **options)
    flags.DEFINE_string("sampler", "greedy", "greedy, temperature, top_k, nucleus or beam", **options)
    flags.DEFINE_float("temperature", None, "for samplers temperature, top_k and nucleus", **options)
    flags.DEFINE_integer("top_k", None, "for sampler top_k: number of most likely tokens", **options)
    flags.DEFINE_float("top_p", None, "for sampler nucleus: probability mass to keep", **options)
    flags.DEFINE_integer("num_beams", None, "for sampler beam: number of beams", **options)
    flags.DEFINE_float("length_penalty", None, "for sampler beam: exponent of the length", **options)
    flags.DEFINE_integer(
        "draft_tokens", None, "for sampler greedy: tokens of earlier text that each step tries; same answers", **options
    )
    flags.DEFINE_integer("seed", 0, "random seed of samplers and of generated images", **options)
    flags.DEFINE_string("special_tokens", None, "<bos> and the like in prompts: refuse, or parse as tokens", **options)
    flags.DEFINE_string("dtype", None, "compute dtype of a base model; float32 if absent", **options)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and prints one line for each answer."""
    values, rest = command_line.read_flags(
        argv, __doc__ or "", _flags, "Flags (--config.KEY=VALUE overrides a key of a run)"
    )
    for line in _lines({name: values[name].value for name in values}, rest):
        print(line)


def _lines(values: dict[str, Any], rest: list[str]) -> Iterable[str]:
    """Returns the lines to print for flag values by name; `rest` holds overrides of the run's config."""
    if (values["workdir"] is None) == (values["model"] is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    # Slow imports, so only after the flags have been checked.
    if values["model"] is not None:
        from paligemma_jax.inference import command

        command_line.parse_overrides(rest, ConfigDict(), list(values))
        compilation_cache.enable()
        lines = command.class_lines if values["class"] else command.answer_lines
        return lines(values, model=values["model"])
    from paligemma_jax.loading import run_config
    from train_jax.config.base import task_class

    config = run_config(values["workdir"])
    command_line.override(config, command_line.parse_overrides(rest, config, list(values)))
    compilation_cache.enable(config.compilation_cache_mb)
    return task_class(config.task).predict(config, values["workdir"], values)
