"""Few-shot tuning of a dual encoder by CoPrompt (Roy and Etemad 2024), and what it is compared with.

    python train.py --config=configs/coprompt.py

tunes the small SigLIP that ships with the package on 48 of the 96 classes of single synthetic objects, one picture of
each, and tests it on these and on the 48 that it has not seen: accuracies `base` and `novel`, and their harmonic mean.
Their names have words for materials and shapes that it has never met ("small shiny cyan block"); their descriptions do
not ("a small cyan cube of metal"), as a language model describes what has a rare name. A minute on two CPU cores, once
the pictures are rendered.

Another method of the same run: --config.method=zero_shot (nothing trains), coop, maple, adapters or full.

    :turned        no new words, but a light that the SigLIP has not met, and 16 pictures of a class
    :methods       all six with three seeds; sweep.png has bars with deviations
    :ablations     of CoPrompt: consistency (weight, kind, side), perturbed inputs, what is attached, layers
    :shots         1, 2, 4, 8 and 16 shots of all classes (protocol few_shot)
    :domain        tested in other styles too (protocol domain_generalization)
    :smoke         seconds

`:turned,domain` and so on make a sweep of that one.

`:clip_b16` has the defaults of the released code for a CLIP B/16; `:clip_b16,dataset=oxford_pets` has what that code
sets for a data set (`DATASETS`) in their place. The words above after a comma make a sweep of it (`:clip_b16,methods`):

    python train.py --config=configs/coprompt.py:clip_b16,dataset=oxford_pets --config.data.source=oxford_pets \\
        --config.data.descriptions=oxford_pets.json --config.model.path=clip-vit-base-patch16

where oxford_pets is a folder in CoOp's layout, or one of class folders (docs/few_shot.md). What was learned lies in the
workdir's `adapter`, apart from its base. Prompts and lambda of a data set are CoPrompt's: sweeps leave them out of the
other methods, `--config.method` does not.
"""

from ml_collections import ConfigDict

from paligemma_jax.data.few_shot.protocols import SHOTS
from paligemma_jax.images import augment
from train_jax.config import base_config, leaves, parse_arg
from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean

SEEDS = (0, 1, 2)
FULL_RATE = 0.1  # of the learning rate, where all weights train
STYLES = ("plain", "turned", "bright", "dark_floor", "noise", "low_resolution")
DEPTH, WEIGHT = 9, 1.0  # layers that have prompts, and lambda, of the released code's defaults
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
    """The config; arg "turned" or "clip_b16" (with "dataset=NAME"), and one of "methods", "ablations", "shots" and
    "domain", or "smoke" for seconds.

    Raises:
      UserError: another one, two sweeps, "turned" beside "clip_b16", or a data set that has no settings.
    """
    arg = parse_arg(arg, turned=False, clip_b16=False, dataset="", smoke=False, **dict.fromkeys(SWEEPS, False))
    chosen = [name for name in SWEEPS if arg[name]]
    if len(chosen) > 1:
        raise UserError(f"the config argument names {' and '.join(chosen)}, expected one sweep: leave one out.")
    if arg.turned and arg.clip_b16:
        raise UserError("the config arguments turned and clip_b16 stand together, expected one: leave one out.")
    config = base_config("paligemma_jax.tasks.coprompt:CoPrompt")
    (clip_b16 if arg.clip_b16 else embedded)(config)
    if arg.turned:
        turned(config)
    if arg.dataset:
        if not arg.clip_b16:
            raise UserError(f"the config argument dataset={arg.dataset} stands alone, expected clip_b16 too: add it.")
        of_dataset(config, arg.dataset)
    if arg.smoke:
        smoke(config)
    if chosen:
        SWEEPS[chosen[0]](config)
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


def seeds(named: dict[str, dict]) -> tuple:
    """Runs of every seed, those of a seed together."""
    return tuple((f"{name}-seed-{seed}", changes | {"seed": seed}) for seed in SEEDS for name, changes in named.items())


def method(config: ConfigDict, name: str, **changes) -> dict:
    """Overrides of one method."""
    if name == "full":
        changes["optimizer.learning_rate"] = FULL_RATE * config.optimizer.learning_rate
    if name != "coprompt":  # prompts and lambda that a config sets are CoPrompt's
        own = ("prompts.text_tokens", "prompts.vision_tokens", "prompts.depth", "consistency.weight")
        changes = {key: None for key in own if leaves(config)[key] is not None} | changes
    return {"method": name} | changes


def methods(config: ConfigDict) -> None:
    """CoPrompt and its baselines, on the classes that were tuned on and on the others."""
    names = ("zero_shot", "coop", "maple", "adapters", "coprompt", "full")
    config.sweep_metric, config.sweep_more = "harmonic_mean", ("base", "novel")
    config.sweep = seeds({name: method(config, name) for name in names})


def ablations(config: ConfigDict) -> None:
    """After the paper's: each changes one thing of CoPrompt, which is `both-1.0` (its lambda).

    On synthetic classes `layers_K` uncouples the prompts too (`depths`).
    """
    weight, own = "consistency.weight", config.consistency.weight or WEIGHT
    found = {f"both-{own}": {}, "no_consistency": {weight: 0.0}}
    found |= {f"on_{side}": {"consistency.on": side} for side in ("text", "image")}
    found |= {"not_perturbed": {"consistency.perturb": False}}
    found |= {"prompts_only": {"prompts.text_adapter": 0, "prompts.image_adapter": 0}}
    found |= {"adapters_only": method(config, "adapters", **{weight: own})}
    found |= {f"both-{value}": {weight: value} for value in (0.1, 0.5, 1.0, 2.0, 8.0, 32.0) if value != own}
    found |= {kind: {"consistency.kind": kind} for kind in ("l1", "mse")}
    whole = config.prompts.depth or DEPTH
    layers = [depth for depth in (1, 3, 6, 9, 12) if depth <= towers(config) and depth != whole]
    found |= {f"layers_{depth}": depths(config, depth) for depth in layers}
    config.sweep_metric, config.sweep_more = "harmonic_mean", ("base", "novel")
    config.sweep = seeds({name: {"method": "coprompt"} | changes for name, changes in found.items()})


def towers(config: ConfigDict) -> int:
    """Layers of the vision tower."""
    return 12 if config.data.name == "images" else 4


def depths(config: ConfigDict, depth: int) -> dict:
    """Prompts in so many layers; in the small SigLIP of the vision tower alone, for which they must not be coupled."""
    if config.data.name == "images":
        return {"prompts.depth": depth}
    return {"prompts.depth": 1, "prompts.vision_depth": depth, "prompts.coupled": False}


def shots(config: ConfigDict) -> None:
    """How many pictures of a class: all classes are tuned on, and tested."""
    config.protocol = "few_shot"
    config.sweep_metric, config.sweep_x, config.sweep_series = "accuracy", "shots", "method"
    names = ("coop", "maple", "adapters", "coprompt")
    config.sweep = seeds({f"{name}-{k}": method(config, name) | {"shots": k} for k in SHOTS for name in names})


def domain(config: ConfigDict) -> None:
    """Tuned in one look and tested in others; of images of one's own, set data.targets."""
    config.protocol = "domain_generalization"
    if config.data.name == "scenes":
        config.data.target_styles = tuple(style for style in STYLES if style != config.data.style)
    names = ("zero_shot", "coop", "maple", "adapters", "coprompt")
    found = {name: method(config, name) for name in names}
    found["no_consistency"] = method(config, "coprompt", **{"consistency.weight": 0.0})
    config.sweep_metric, config.sweep_more = "target_mean", ("source", *config.data.target_styles)
    config.sweep = seeds(found)


SWEEPS = {"methods": methods, "ablations": ablations, "shots": shots, "domain": domain}
