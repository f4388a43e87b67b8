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

from absl import flags
from ml_collections import ConfigDict

from train_jax.config import command_line
from train_jax.core.errors import UserError, quoted

ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r"})
SAMPLER_OPTIONS = ("temperature", "top_k", "top_p", "num_beams", "length_penalty")


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
    if values["class"].value:
        _classify(values, rest)
        return
    from paligemma_jax.inference.answer import predict
    from paligemma_jax.loading import run_config  # slow to import: after mistakes in the flags have been told

    config = run_config(values.workdir) if values.workdir else None
    overrides = command_line.parse_overrides(rest, config or ConfigDict(), list(values))
    if config is not None:
        command_line.override(config, overrides)
        if config.task.endswith(":TextToImage"):
            _draw(values, config)
            return
    if values.out is not None:
        raise UserError(f"--out={values.out} is given, but only runs of configs/flow_clevr.py draw: leave it out.")
    answers = predict(
        values.image,
        values.prompt,
        workdir=values.workdir,
        model=values.model,
        dtype=values.dtype,
        config=config,
        tokenizer=values.tokenizer,
        checkpoint=values.checkpoint,
        max_new_tokens=values.max_new_tokens,
        sampler=values.sampler,
        seed=values.seed,
        special_tokens=values.special_tokens,
        **{name: values[name].value for name in SAMPLER_OPTIONS},
    )
    for image, prompt, answer in answers:
        print(f"{image}  {prompt}  ->  {answer}".translate(ESCAPES))


def _draw(values: flags.FlagValues, config: ConfigDict) -> None:
    """Draws the prompts, prints where."""
    if values.image:
        raise UserError(
            f"--image={values.image[0]} is given to a run that draws, expected prompts alone: leave it out."
        )
    from paligemma_jax.tasks.text_to_image.draw import draw

    file = values.out or f"{values.workdir}/drawn.png"
    draw(values.workdir, values.prompt, file, config=config, checkpoint=values.checkpoint, seed=values.seed)
    print(f"{len(values.prompt)} picture(s) in {file}")


def _classify(values: flags.FlagValues, rest: list[str]) -> None:
    """Prints the likelihood of every class, one line an image."""
    if values.prompt or rest:
        raise UserError(f"found {quoted((values.prompt + rest)[0])} beside --class, which goes without: leave one out.")
    if (values.workdir is None) == (values.model is None):
        raise UserError("give either --workdir=DIR (a run) or --model=PATH (a base model), one of the two.")
    from paligemma_jax.inference.classify import classify

    classes = values["class"].value
    scores = classify(
        values.image,
        classes,
        values.template or None,
        model=values.workdir or values.model,
        tokenizer=values.tokenizer,
        dtype=values.dtype or "float32",
        checkpoint=values.checkpoint,
    )
    for image, row in zip(values.image, scores, strict=True):
        likely = "  ".join(f"{name} {value:.3f}" for name, value in zip(classes, row, strict=True))
        print(f"{image}  {likely}".translate(ESCAPES))


if __name__ == "__main__":
    command_line.run(main)
