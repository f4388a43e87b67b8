r"""Few-shot tuning of a dual encoder by CoPrompt (Roy and Etemad 2024) or by one of its baselines.

    python train.py --config=configs/coprompt.py

tunes the small SigLIP that ships with the package on 48 of 96 classes of single synthetic objects, with one image of
each class, and tests it on these classes (accuracy `base`), on the other 48 (`novel`), and reports the harmonic mean of
both. Class names contain words for materials and shapes that the SigLIP has not been trained on ("small shiny cyan
block"). Descriptions of the classes, which CoPrompt's consistency loss uses, contain only known words ("a small cyan
cube of metal"), as a language model would describe an object with a rare name. The run takes a minute on two CPU cores
once the images are rendered.

`--config.method=` chooses the method: coprompt (default), zero_shot (trains nothing), coop, maple, adapters or full.

Arguments, written after a colon and joined by commas:

    :turned         class names in known words, 16 images of a class, under a light that the SigLIP has not seen
    :clip_b16       CLIP B/16 on your images, with the defaults of the released code
    dataset=NAME    with clip_b16: what the released code sets for a data set (the names in `DATASETS`)
    :smoke          takes seconds

For example:

    python train.py --config=configs/coprompt.py:clip_b16,dataset=oxford_pets --config.data.source=oxford_pets \
        --config.data.descriptions=oxford_pets.json --config.model.path=clip-vit-base-patch16

where oxford_pets is a folder in CoOp's layout, or one with a folder for each class (docs/few_shot.md). The trained
parameters are written to the workdir's `adapter`, without the base.

Sweeps over this run have configs of their own and take the same arguments: `coprompt_methods.py` (all six methods),
`coprompt_ablations.py` (of CoPrompt), `coprompt_shots.py` (images of a class) and `coprompt_domain.py` (other styles).
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
"""{data set: (prompts in each layer, layers with prompts, lambda)}, from trainers/constants.py of the released code,
which overrides its yaml and its command line. The names are those of its configs/datasets."""
EPOCHS = {"food101": 5.0}  # all others: 8


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is described above.

    Raises:
      UserError: an unknown argument, "turned" together with "clip_b16", or a data set without settings.
    """
    arg = parse_arg(arg, MOVED, turned=False, clip_b16=False, dataset="", smoke=False)
    refuse_together(arg, ("turned", "clip_b16"), "turned changes the run of the small SigLIP")
    config = base_config("paligemma_jax.tasks.coprompt:CoPrompt")
    (clip_b16 if arg.clip_b16 else embedded)(config)
    if arg.turned:
        turned(config)
    if arg.dataset:
        if not arg.clip_b16:
            dataset = f"dataset={arg.dataset}"
            raise UserError(f"config argument {dataset} needs clip_b16: write :clip_b16,{dataset}.")
        of_dataset(config, arg.dataset)
    if arg.smoke:
        smoke(config)
    return config


def embedded(config: ConfigDict) -> None:
    """Sets the small SigLIP on synthetic classes; its text tower has one layer, so only that layer has prompts."""
    config.template, config.init_words = "a {}", "one object: a"  # words of its captions
    config.data.words, config.shots = "others", 1
    config.batch_size, config.total_steps = 32, 150
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule, config.optimizer.warmup_steps = "cosine", 1
    config.log_steps = 15
    config.eval_percent = config.checkpoint_percent = 1.0


def turned(config: ConfigDict) -> None:
    """Sets class names in the words of the SigLIP's captions and images lit from the other side."""
    config.data.words, config.data.style, config.shots = "captions", "turned", 16
    config.total_steps, config.optimizer.warmup_steps, config.log_steps = 240, 12, 24


def clip_b16(config: ConfigDict) -> None:
    """Sets the defaults of the released code: its configs/trainers/coprompt.yaml, or the source that a comment names.

    The sizes of prompts and adapters come from `pg.few_shot_method`: 2 coupled prompts in each of 9 layers, 128 units.
    """
    config.model.path = "hf://openai/clip-vit-base-patch16"
    config.template = config.init_words + " {}."  # "a photo of a {}."
    config.data.name = "images"
    # The two strengths are ours: the released code draws both views with one RandAugment.
    config.views.tuned.update(vars(augment.LIGHT))
    config.views.frozen.update(vars(augment.STRONG))
    config.consistency.weight = None  # takes the method's lambda, which is 1 as in the yaml
    config.batch_size, config.total_epochs = 4, 8.0
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.0035
    config.optimizer.momentum = 0.9  # Dassl's default
    # 10 x Dassl's 5e-4. Dassl adds the decay to the gradient, where momentum sums it up tenfold; ours is decoupled.
    config.optimizer.weight_decay, config.optimizer.weight_decay_mask = 5e-3, ".*"
    # Ours decays at each step, from the peak to 0. The released code decays once an epoch, on a cosine of 8 epochs that
    # starts after the first, so that its last epoch has 14.6 % of the peak.
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs, config.optimizer.warmup_constant = 1.0, 1e-5
    config.log_steps = 20
    config.eval_percent = config.checkpoint_percent = 1.0


def of_dataset(config: ConfigDict, name: str) -> None:
    """Sets what the released code sets for the data set `name`."""
    if name not in DATASETS:
        raise UserError(
            f"config argument dataset={name} has no settings, expected one of {', '.join(DATASETS)}"
            f"{did_you_mean(name, DATASETS) or ': choose one, or leave it out'}"
        )
    tokens, config.prompts.depth, config.consistency.weight = DATASETS[name]
    config.prompts.text_tokens = config.prompts.vision_tokens = tokens
    config.total_epochs = EPOCHS.get(name, config.total_epochs)


def smoke(config: ConfigDict) -> None:
    """Shrinks the run to seconds: two images of a class, four steps."""
    config.data.per_class, config.shots = (2, 1, 1), 2
    config.total_epochs, config.total_steps = None, 4
    config.log_steps = 2
    config.optimizer.warmup_epochs, config.optimizer.warmup_steps = None, 1
