"""Few-shot tuning of a dual encoder by CoPrompt (Roy and Etemad 2024), and what it is compared with.

    python train.py --config=configs/coprompt.py

tunes the small SigLIP that ships with the package on 48 of the 96 classes of single synthetic objects, 16 pictures of
each, and tests it on these and on the 48 that it has not seen: accuracies `base` and `novel`, and their harmonic mean.
The pictures are lit from the other side (style "turned"), which that SigLIP has never met: of the classes to
tune on it knows 82 % (docs/coprompt.md tells of other styles). A minute on two CPU cores, once they are rendered.

Another method of the same run: --config.method=zero_shot (nothing trains), coop, maple, adapters or full.

    :methods       all six with three seeds; sweep.png has bars with deviations
    :ablations     of CoPrompt: consistency (weight, kind, side), perturbed inputs, what is attached, layers
    :shots         1, 2, 4, 8 and 16 shots of all classes (protocol few_shot)
    :domain        tested in other styles too, plain ones among them (protocol domain_generalization)
    :smoke         seconds

`:clip_b16` has the settings of the released code for a CLIP B/16; with the words above after a comma its sweeps are
(`:clip_b16,methods`):

    python train.py --config=configs/coprompt.py:clip_b16 --config.model.path=clip-vit-base-patch16 \
        --config.data.source=oxford_pets --config.data.descriptions=oxford_pets.json

where oxford_pets is a folder in CoOp's layout, or one of class folders (docs/few_shot.md). What was learned lies in the
workdir's `adapter`, apart from its base.
"""

from ml_collections import ConfigDict

from paligemma_jax.data import augment
from train_jax.config import base_config, parse_arg
from train_jax.errors import UserError

SEEDS = (0, 1, 2)
SHOTS = (1, 2, 4, 8, 16)
FULL_RATE = 0.1  # of the learning rate, where all weights train
OTHER_STYLES = ("plain", "noise", "low_resolution", "bright")


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "clip_b16", and one of "methods", "ablations", "shots" and "domain"; "smoke" for seconds."""
    arg = parse_arg(arg, clip_b16=False, smoke=False, **dict.fromkeys(SWEEPS, False))
    chosen = [name for name in SWEEPS if arg[name]]
    if len(chosen) > 1:
        raise UserError(f"the config argument names {' and '.join(chosen)}, expected one sweep: leave one out.")
    config = base_config("paligemma_jax.tasks.coprompt:CoPrompt")
    (clip_b16 if arg.clip_b16 else embedded)(config)
    if arg.smoke:
        smoke(config)
    if chosen:
        SWEEPS[chosen[0]](config)
    return config


def embedded(config: ConfigDict) -> None:
    """The small SigLIP on synthetic classes; its text tower has one layer, so prompts are shallow."""
    config.template, config.init_words = "a {}", "one object: a"  # its captions' words
    config.data.style = "turned"
    config.batch_size, config.total_epochs = 32, 10.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule, config.optimizer.warmup_epochs = "cosine", 0.5
    config.log_epochs = 1.0
    config.eval_percent = config.checkpoint_percent = 1.0


def clip_b16(config: ConfigDict) -> None:
    """The settings of the released code (configs/trainers/vit_b16_c2_ep5_batch4_2ctx_randaug.yaml) where none is noted.

    Prompts and adapters are those of `pg.few_shot_method`: 2 coupled prompts in each of 9 layers, 128 units.
    """
    config.model.path = "hf://openai/clip-vit-base-patch16"
    config.template = config.init_words + " {}."  # "a photo of a {}."
    config.data.name = "images"
    # Views are ours: the code draws both by one RandAugment.
    config.views.tuned.update(vars(augment.LIGHT))
    config.views.frozen.update(vars(augment.STRONG))
    config.consistency.weight = None  # lambda is the method's, 1 as in the code
    config.batch_size, config.total_epochs = 4, 8.0
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.0035
    config.optimizer.momentum = 0.9  # Dassl's default
    # Dassl's default of 5e-4 is added to the gradient, which momentum sums up to ten times as much; ours is not.
    config.optimizer.weight_decay, config.optimizer.weight_decay_mask = 5e-3, ".*"
    config.optimizer.schedule = "cosine"  # of every step; the code's goes down once an epoch
    config.optimizer.warmup_epochs, config.optimizer.warmup_constant = 1.0, 1e-5
    config.log_steps = 20
    config.eval_percent = config.checkpoint_percent = 1.0


def smoke(config: ConfigDict) -> None:
    """Seconds: two pictures of a class, four steps."""
    config.data.per_class, config.shots = (2, 1, 1), 2
    config.total_epochs, config.total_steps = None, 4
    config.log_epochs, config.log_steps = None, 2
    config.optimizer.warmup_epochs, config.optimizer.warmup_steps = None, 1


def seeds(named: dict[str, dict]) -> tuple:
    """Runs of every seed, those of a seed together."""
    return tuple((f"{name}-seed-{seed}", changes | {"seed": seed}) for seed in SEEDS for name, changes in named.items())


def method(config: ConfigDict, name: str, **changes) -> dict:
    """Overrides of one method."""
    if name == "full":
        changes["optimizer.learning_rate"] = FULL_RATE * config.optimizer.learning_rate
    return {"method": name} | changes


def methods(config: ConfigDict) -> None:
    """CoPrompt and its baselines, on the classes that were tuned on and on the others."""
    names = ("zero_shot", "coop", "maple", "adapters", "coprompt", "full")
    config.sweep_metric, config.sweep_more = "harmonic_mean", ("base", "novel")
    config.sweep = seeds({name: method(config, name) for name in names})


def ablations(config: ConfigDict) -> None:
    """The paper's: each changes one thing of CoPrompt, which is `both-1.0`."""
    weight = "consistency.weight"
    found = {"both-1.0": {}, "no_consistency": {weight: 0.0}}
    found |= {f"on_{side}": {"consistency.on": side} for side in ("text", "image")}
    found |= {"not_perturbed": {"consistency.perturb": False}}
    found |= {"prompts_only": {"prompts.text_adapter": 0, "prompts.image_adapter": 0}}
    found |= {"adapters_only": {"method": "adapters", weight: 1.0}}
    found |= {f"both-{value}": {weight: value} for value in (0.1, 0.5, 2.0, 8.0)}
    found |= {kind: {"consistency.kind": kind} for kind in ("l1", "mse")}
    found |= {f"layers_{depth}": depths(config, depth) for depth in (1, 3, 6, 12) if depth <= towers(config)}
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
    if config.data.name == "scenes":  # as many updates whatever the shots
        config.total_epochs, config.total_steps = None, 150
    names = ("coop", "maple", "adapters", "coprompt")
    config.sweep = seeds({f"{name}-{k}": method(config, name) | {"shots": k} for k in SHOTS for name in names})


def domain(config: ConfigDict) -> None:
    """Tuned in one look and tested in others; of images of one's own, set data.targets."""
    config.protocol = "domain_generalization"
    if config.data.name == "scenes":
        config.data.target_styles = OTHER_STYLES
    names = ("zero_shot", "coop", "maple", "adapters", "coprompt")
    config.sweep_metric, config.sweep_more = "target_mean", ("source", *config.data.target_styles)
    config.sweep = seeds({name: method(config, name) for name in names})


SWEEPS = {"methods": methods, "ablations": ablations, "shots": shots, "domain": domain}
