r"""Few-shot tuning of a dual encoder by CoPrompt (Roy and Etemad 2024), and what it is compared with.

    python train.py --config=configs/coprompt.py

tunes the small SigLIP that ships with the package on 48 of the 96 classes of single synthetic objects, one picture of
each, and tests it on these and on the 48 that it has not seen: accuracies `base` and `novel`, and their harmonic mean.
Their names have words for materials and shapes that it has never met ("small shiny cyan block"); their descriptions do
not ("a small cyan cube of metal"), as a language model describes what has a rare name. A minute on two CPU cores, once
the pictures are rendered.

Another method of the same run: --config.method=zero_shot (nothing trains), coop, maple, adapters or full.

    :turned        no new words, but a light that the SigLIP has not met, and 16 pictures of a class
    :smoke         seconds

Sweeps on top of it have files of their own and take the same arguments: `coprompt_methods.py` (all six methods),
`coprompt_ablations.py` (of CoPrompt), `coprompt_shots.py` and `coprompt_domain.py` (other styles).

`:clip_b16` has the defaults of the released code for a CLIP B/16; `:clip_b16,dataset=oxford_pets` has what that code
sets for a data set (`DATASETS`) in their place:

    python train.py --config=configs/coprompt.py:clip_b16,dataset=oxford_pets --config.data.source=oxford_pets \
        --config.data.descriptions=oxford_pets.json --config.model.path=clip-vit-base-patch16

where oxford_pets is a folder in CoOp's layout, or one of class folders (docs/few_shot.md). What was learned lies in the
workdir's `adapter`, apart from its base.
"""

from ml_collections import ConfigDict

from paligemma_jax.images import augment
from train_jax.config import base_config, parse_arg, refuse_together
from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean

MOVED = {name: f"configs/coprompt_{name}.py" for name in ("methods", "ablations", "shots", "domain")}
DATASETS = {
    "caltech101": (4, 12, 4.0),
    "dtd": (2, 12, 8.0),
    "eurosat": (2, 12, 0.1),
    "fgvc_aircraft": (4, 9, 2.0),
    "food101": (4, 9, 0.5),
    "imagenet": (4, 12, 8.0),
    "oxford_flowers": (4, 9, 8.0),
    "oxford_pets": (2, 12, 0.1),
    "stanford_cars": (4, 12, 4.0),
    "sun397": (4, 12, 8.0),
    "ucf101": (4, 12, 2.0),
}
"""Prompts a layer, layers and lambda by data set: trainers/constants.py of the released code, which overrides its yaml
and the command line; names are those of its configs/datasets."""
EPOCHS = {"food101": 5.0}  # and 8 elsewhere


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg "turned" or "clip_b16" (with "dataset=NAME"), and "smoke" for seconds.

    Raises:
      UserError: another argument, "turned" beside "clip_b16", or a data set that has no settings.
    """
    arg = parse_arg(arg, MOVED, turned=False, clip_b16=False, dataset="", smoke=False)
    refuse_together(arg, ("turned", "clip_b16"), "turned is of the small SigLIP")
    config = base_config("paligemma_jax.tasks.coprompt:CoPrompt")
    (clip_b16 if arg.clip_b16 else embedded)(config)
    if arg.turned:
        turned(config)
    if arg.dataset:
        if not arg.clip_b16:
            raise UserError(f"the config argument dataset={arg.dataset} needs clip_b16: add it.")
        of_dataset(config, arg.dataset)
    if arg.smoke:
        smoke(config)
    return config


def embedded(config: ConfigDict) -> None:
    """The small SigLIP on synthetic classes; its text tower has one layer, so prompts are shallow."""
    config.template, config.init_words = "a {}", "one object: a"  # its captions' words
    config.data.words, config.shots = "others", 1
    config.batch_size, config.total_steps = 32, 150
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule, config.optimizer.warmup_steps = "cosine", 1
    config.log_steps = 15
    config.eval_percent = config.checkpoint_percent = 1.0


def turned(config: ConfigDict) -> None:
    """The small SigLIP on classes in its captions' words, lit from the other side."""
    config.data.words, config.data.style, config.shots = "captions", "turned", 16
    config.total_steps, config.optimizer.warmup_steps, config.log_steps = 240, 12, 24


def clip_b16(config: ConfigDict) -> None:
    """The defaults of the released code (its configs/trainers/coprompt.yaml) where no other source is noted.

    Prompts and adapters are those of `pg.few_shot_method`: 2 coupled prompts in each of 9 layers, 128 units.
    """
    config.model.path = "hf://openai/clip-vit-base-patch16"
    config.template = config.init_words + " {}."  # "a photo of a {}."
    config.data.name = "images"
    # Views are ours: the code draws both by one RandAugment.
    config.views.tuned.update(vars(augment.LIGHT))
    config.views.frozen.update(vars(augment.STRONG))
    config.consistency.weight = None  # lambda is the method's, 1 as in the yaml
    config.batch_size, config.total_epochs = 4, 8.0
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.0035
    config.optimizer.momentum = 0.9  # Dassl's default
    # Dassl's default of 5e-4 is added to the gradient, which momentum sums up to ten times as much; ours is not.
    config.optimizer.weight_decay, config.optimizer.weight_decay_mask = 5e-3, ".*"
    # From the peak to 0, at every step. The code's goes down once an epoch, on a cosine of 8 epochs that begins behind
    # the first: its last epoch is at 14.6 % of the peak.
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs, config.optimizer.warmup_constant = 1.0, 1e-5
    config.log_steps = 20
    config.eval_percent = config.checkpoint_percent = 1.0


def of_dataset(config: ConfigDict, name: str) -> None:
    """What the released code sets for a data set."""
    if name not in DATASETS:
        raise UserError(
            f"the config argument dataset={name} has no settings, expected one of {', '.join(DATASETS)}"
            f"{did_you_mean(name, DATASETS) or ': choose one, or leave it out'}"
        )
    tokens, config.prompts.depth, config.consistency.weight = DATASETS[name]
    config.prompts.text_tokens = config.prompts.vision_tokens = tokens
    config.total_epochs = EPOCHS.get(name, config.total_epochs)


def smoke(config: ConfigDict) -> None:
    """Seconds: two pictures of a class, four steps."""
    config.data.per_class, config.shots = (2, 1, 1), 2
    config.total_epochs, config.total_steps = None, 4
    config.log_steps = 2
    config.optimizer.warmup_epochs, config.optimizer.warmup_steps = None, 1
