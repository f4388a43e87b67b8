"""The config keys of few-shot tuning: defaults, checks that need nothing but the config, and the method they name."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paligemma_jax.adapt.few_shot.methods import FewShotMethod, few_shot_method
from paligemma_jax.adapt.few_shot.prompts import TRAINABLE
from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.synthetic_clevr.classes import COMBINATIONS, HALVES, IN_CAPTIONS, WORDS
from paligemma_jax.data.synthetic_clevr.styles import PLAIN, STYLES
from paligemma_jax.images import augment
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.losses.coprompt import KINDS, SIDES
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.tasks import common
from train_jax.config.base import check_choices
from train_jax.core.errors import UserError, quoted
from train_jax.core.files import cache_dir

SOURCES = ("scenes", "images")
CHOICES = {
    "model.remat": common.REMAT,
    "consistency.kind": KINDS,
    "consistency.on": SIDES,
    "protocol": protocols.KINDS,
    "data.name": SOURCES,
    "data.style": tuple(STYLES),
    "data.novel": HALVES,
    "data.words": WORDS,
}
OTHERS = ("cross_dataset", "domain_generalization")  # protocols that test on further data sets


def defaults() -> ConfigDict:
    """The keys of the task with their defaults."""
    config = ConfigDict()
    # path: a SigLIP or CLIP: folder, hf://owner/name, .npz, or a name that ships.
    config.model = ConfigDict({"path": "tiny-siglip", "remat": "none", "unroll": False})
    config.tokenizer = placeholder(str)  # its folder or file; None = beside model.path
    config.method = "coprompt"  # zero_shot | coop | maple | adapters | coprompt | full
    config.prompts = ConfigDict(
        {  # None = the method's own (adapt/few_shot/methods.py), but no more layers than the towers have
            "text_tokens": placeholder(int),
            "vision_tokens": placeholder(int),
            "depth": placeholder(int),
            "vision_depth": placeholder(int),
            "coupled": placeholder(bool),
            "text_adapter": placeholder(int),
            "image_adapter": placeholder(int),
            "text_mix": placeholder(float),
            "image_mix": placeholder(float),
        }
    )
    config.init_words = placeholder(str)  # that text prompts of the first layer start as; None = drawn
    config.init_words = "a photo of a"
    config.template = "a photo of a {}."  # how classes are written
    config.consistency = ConfigDict(
        {
            "weight": placeholder(float),  # lambda; None = 1 in coprompt, 0 in all others
            "kind": "cosine",  # cosine | l1 | mse
            "on": "both",  # text | image | both
            "perturb": True,  # the frozen branch has descriptions and a view of its own; False: the tuned one's inputs
        }
    )
    config.protocol = "base_to_novel"  # few_shot | base_to_novel | cross_dataset | domain_generalization
    config.shots = 16  # images of a class, drawn by the seed
    config.data = ConfigDict(
        {
            "name": "scenes",  # scenes (synthetic classes) | images
            "descriptions": placeholder(str),  # a JSON file {class: [sentences]}; None = those of the synthetic classes
            # images:
            "source": placeholder(str),  # class folders, or CoOp's layout
            "targets": (),  # further ones to test on, of cross_dataset and domain_generalization
            # Synthetic classes:
            "style": PLAIN,  # of what is tuned on and tested on
            "novel": COMBINATIONS,  # what novel classes have of their own: combinations | colors | pairings
            "words": IN_CAPTIONS,  # classes are named in words of the small SigLIP's captions, or in "others"
            "target_styles": (),  # further ones to test on, of domain_generalization
            "cache_dir": cache_dir(),
            "build_workers": 2,
            "per_class": (16, 4, 10),  # pictures to draw shots from, to validate on, to test on
        }
    )
    config.views = ConfigDict({"tuned": vars(augment.SCENES_LIGHT), "frozen": vars(augment.SCENES_STRONG)})
    return config


def check(config: ConfigDict) -> None:
    """Checks values on their own, before anything is read.

    Raises:
      UserError: the first fault found.
    """
    check_choices(config, CHOICES)
    for side in config.views.values():
        Augmentation(**side)
    if config.template.count("{}") != 1:
        raise UserError(
            f"template is {quoted(config.template)}, expected one {{}} where the class's name stands: change it."
        )
    if config.shots < 1:
        raise UserError(f"shots is {config.shots}, expected 1 or more: change it.")
    if (few_shot_method(config.method).trainable != TRAINABLE) and config.consistency.weight:
        raise UserError(
            f"consistency.weight is {config.consistency.weight} of method {config.method!r}, expected a method that "
            "leaves the base as it is and trains prompts or adapters: change the method, or set the weight to None."
        )
    if config.consistency.weight is not None and config.consistency.weight < 0:
        raise UserError(f"consistency.weight is {config.consistency.weight}, expected 0 or more: change it.")
    _check_sides(config)
    (_check_scenes if config.data.name == "scenes" else _check_images)(config)


def _check_sides(config: ConfigDict) -> None:
    """Raises UserError for consistency of embeddings that cannot change."""
    on = config.consistency.on
    prompts = few_shot_method(config.method, **_changes(config)).prompts
    if not weight(config) or prompts is None:  # a weight without prompts is refused: all of the base trains, or nothing
        return
    for side, other, learned in (
        ("text", "image", prompts.text_tokens or prompts.text_adapter),
        ("image", "text", prompts.vision_tokens or prompts.image_adapter),
    ):
        if on in (side, "both") and not learned:
            raise UserError(
                f"consistency.on is {on!r} but method {config.method!r} has neither prompts nor an adapter on the "
                f"{side} side, whose embeddings stay what they are: set consistency.on={other}, or give it some."
            )


def _check_scenes(config: ConfigDict) -> None:
    data = config.data
    if data.source is not None:
        raise UserError(f"data.source is {data.source!r} of synthetic classes: set data.name=images.")
    if config.protocol == "cross_dataset":
        raise UserError(
            "protocol is 'cross_dataset' of synthetic classes, which are one data set: set data.name=images."
        )
    if bool(data.target_styles) != (config.protocol in OTHERS) or data.targets:
        raise UserError(
            f"data.target_styles is {data.target_styles} and data.targets {data.targets} with protocol "
            f"{config.protocol!r} of synthetic classes, expected styles with domain_generalization and nothing "
            "otherwise: change one."
        )
    if set(data.target_styles) - set(STYLES) or data.style in data.target_styles:
        raise UserError(
            f"data.target_styles is {data.target_styles} beside {data.style!r}, expected others of "
            f"{', '.join(STYLES)}: change them."
        )
    if len(data.per_class) != 3 or min(data.per_class) < 1:
        raise UserError(f"data.per_class is {data.per_class}, expected three numbers of 1 or more: change it.")


def _check_images(config: ConfigDict) -> None:
    data = config.data
    if data.source is None:
        raise UserError("data.name is 'images' but data.source is not set: add --config.data.source=FOLDER.")
    if bool(data.targets) != (config.protocol in OTHERS) or data.target_styles:
        raise UserError(
            f"data.targets is {data.targets} and data.target_styles {data.target_styles} with protocol "
            f"{config.protocol!r} of images, expected folders with {' and '.join(OTHERS)} and nothing otherwise: "
            "change one."
        )
    if needs_descriptions(config) and data.descriptions is None:
        raise UserError(
            "data.descriptions is not set, which the frozen branch reads, expected a JSON file {class: [sentences]}: "
            "add it, or set consistency.perturb=False to let it read the class texts."
        )


def weight(config: ConfigDict) -> float:
    """Lambda, of the config or else of the method."""
    if config.consistency.weight is not None:
        return float(config.consistency.weight)
    return 1.0 if few_shot_method(config.method).consistency else 0.0


def needs_descriptions(config: ConfigDict) -> bool:
    """Whether the frozen branch reads descriptions."""
    return bool(weight(config)) and config.consistency.on != "image" and config.consistency.perturb


def _changes(config: ConfigDict) -> dict[str, Any]:
    """Fields of the method's prompts that the config sets."""
    return {key: value for key, value in config.prompts.items() if value is not None}


def method(config: ConfigDict, model: DualEncoderConfig) -> FewShotMethod:
    """What the config's method attaches to a model; layers that its towers lack are left out of the preset's.

    Raises:
      UserError: an unknown method, or `prompts` of one that attaches nothing.
    """
    changes = _changes(config)
    chosen = few_shot_method(config.method, **changes)
    if chosen.prompts is None or "depth" in changes:
        return chosen
    towers = [
        (chosen.prompts.text_tokens, model.text.depth),
        (chosen.prompts.vision_tokens if chosen.prompts.vision_depth is None else 0, model.vision.depth),
    ]
    depth = min([chosen.prompts.depth, *(layers for tokens, layers in towers if tokens)])
    return dataclasses.replace(chosen, prompts=dataclasses.replace(chosen.prompts, depth=depth))
