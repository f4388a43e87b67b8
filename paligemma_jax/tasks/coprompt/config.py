"""The config keys of few-shot tuning, checks that need nothing but the config, and the method they name."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.adapt.few_shot.learned_prompts import TRAINABLE
from paligemma_jax.adapt.few_shot.methods import FEW_SHOT_METHODS, FewShotMethod, few_shot_method
from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.synthetic_clevr.classes import COMBINATIONS, HALVES, IN_CAPTIONS, WORDS
from paligemma_jax.data.synthetic_clevr.styles import PLAIN, STYLES
from paligemma_jax.images import augment
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.losses.coprompt import KINDS, SIDES
from paligemma_jax.models.attention import KERNELS
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.tasks import common
from train_jax.config.base import check_declared, leaves
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError, quoted
from train_jax.core.files import cache_dir

SOURCES = ("scenes", "images")
FULL_RATE = 0.1  # of the learning rate, where all weights train
OTHERS = ("cross_dataset", "domain_generalization")  # protocols that test on further data sets


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """`config.model`: the base."""

    path: str = key(
        "tiny-siglip",
        "a SigLIP or CLIP: folder, hf://owner/name, .npz, or a name that ships with the package",
        architecture=True,
    )
    remat: str = key("none", "what the backward pass recomputes", choices=common.REMAT, resume_safe=True)
    unroll: bool = key(False, "compile the layers without a loop", resume_safe=True)
    attention: str = key(
        "auto",
        "plain; flash, which holds no matrix of scores; auto = flash on TPUs from 512 tokens on (docs/attention.md)",
        choices=KERNELS,
        resume_safe=True,
    )


@dataclasses.dataclass(frozen=True)
class PromptKeys:
    """`config.prompts`; None = the method's own value (adapt/few_shot/methods.py), limited by the towers' depth."""

    text_tokens: int | None = key(None, "learned tokens of the text tower")
    vision_tokens: int | None = key(None, "learned tokens of the image tower")
    depth: int | None = key(None, "layers that have prompts")
    vision_depth: int | None = key(None, "the same of the image tower, if it differs")
    coupled: bool | None = key(None, "image prompts are linear functions of the text prompts")
    text_adapter: int | None = key(None, "hidden units of the adapter of text embeddings; 0 = none")
    image_adapter: int | None = key(None, "hidden units of the adapter of image embeddings; 0 = none")
    text_mix: float | None = key(None, "share of the text adapter's output in its embedding")
    image_mix: float | None = key(None, "share of the image adapter's output in its embedding")


@dataclasses.dataclass(frozen=True)
class ConsistencyKeys:
    """`config.consistency`: with the frozen base."""

    weight: float | None = key(None, "lambda; None = 1 in coprompt, 0 in all others", minimum=0)
    kind: str = key("cosine", "distance of embeddings", choices=KINDS)
    on: str = key("both", "whose embeddings", choices=SIDES)
    perturb: bool = key(
        True, "the frozen branch has descriptions and a view of its own; False = the tuned branch's inputs"
    )


@dataclasses.dataclass(frozen=True)
class SourceKeys:
    """`config.data`: classes and their images (docs/few_shot.md)."""

    name: str = key("scenes", "scenes (synthetic classes) or images", choices=SOURCES)
    descriptions: str | None = key(None, "a JSON file {class: [sentences]}; None = those of the synthetic classes")
    source: str | None = key(None, "images: class folders, or CoOp's layout")
    targets: tuple = key((), "images: further data sets to test on, of cross_dataset and domain_generalization")
    style: str = key(PLAIN, "scenes: what is tuned on and tested on", choices=STYLES)
    novel: str = key(COMBINATIONS, "scenes: what distinguishes novel classes", choices=HALVES)
    words: str = key(
        IN_CAPTIONS, "scenes: whether names of classes use the words of the small SigLIP's captions", choices=WORDS
    )
    target_styles: tuple = key((), "scenes: further styles to test on, of domain_generalization")
    cache_dir: str = key(cache_dir, "folder for rendered scenes", resume_safe=True)
    build_workers: int = key(2, "processes that render", resume_safe=True)
    per_class: tuple = key((16, 4, 10), "scenes: images per class to draw shots from, to validate on, to test on")


@dataclasses.dataclass(frozen=True)
class ViewKeys:
    """`config.views`: augmentation of the images of either branch, see images/augment.py."""

    tuned: Augmentation = section(lambda: augment.SCENES_LIGHT)
    frozen: Augmentation = section(lambda: augment.SCENES_STRONG)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the task."""

    model: ModelKeys = section(ModelKeys)
    tokenizer: str | None = key(None, "its folder or file; None = beside model.path")
    method: str = key("coprompt", "what is tuned", choices=FEW_SHOT_METHODS, architecture=True)
    prompts: PromptKeys = section(PromptKeys, architecture=True)
    init_words: str | None = key("a photo of a", "what text prompts of the first layer start as; None = random")
    template: str = key("a photo of a {}.", "text of a class")
    consistency: ConsistencyKeys = section(ConsistencyKeys)
    protocol: str = key("base_to_novel", "what is tested on what (docs/few_shot.md)", choices=protocols.KINDS)
    shots: int = key(16, "images of a class, drawn by the seed", minimum=1)
    data: SourceKeys = section(SourceKeys)
    views: ViewKeys = section(ViewKeys)


def check(config: ConfigDict) -> None:
    """Checks values on their own, before anything is read.

    Raises:
      UserError: the first fault found.
    """
    check_declared(config)
    for side in config.views.values():
        Augmentation(**side)
    if config.template.count("{}") != 1:
        raise UserError(
            f"template is {quoted(config.template)}, expected one {{}} where the class's name goes: change it."
        )
    if (few_shot_method(config.method).trainable != TRAINABLE) and config.consistency.weight:
        raise UserError(
            f"consistency.weight is {config.consistency.weight} of method {config.method!r}, expected a method that "
            "leaves the base as it is and trains prompts or adapters: change the method, or set the weight to None."
        )
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
                f"{side} side, whose embeddings do not change: set consistency.on={other}, or give it some."
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
    """Returns lambda, of the config or else of the method."""
    if config.consistency.weight is not None:
        return float(config.consistency.weight)
    return 1.0 if few_shot_method(config.method).consistency else 0.0


def needs_descriptions(config: ConfigDict) -> bool:
    """Returns whether the frozen branch reads descriptions."""
    return bool(weight(config)) and config.consistency.on != "image" and config.consistency.perturb


def _changes(config: ConfigDict) -> dict[str, Any]:
    """Fields of the method's prompts that the config sets."""
    return {key: value for key, value in config.prompts.items() if value is not None}


def method(config: ConfigDict, model: DualEncoderConfig) -> FewShotMethod:
    """Returns the config's method; layers that the model's towers lack are left out of the preset's.

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


def method_overrides(config: ConfigDict, name: str, **changes: Any) -> dict[str, Any]:
    """Returns the overrides of a sweep's run by one method, with further `changes` by dotted key.

    Prompts and lambda that the config sets are CoPrompt's: other methods have their own.
    """
    if name == "full":
        changes["optimizer.learning_rate"] = FULL_RATE * config.optimizer.learning_rate
    if name != "coprompt":
        own = ("prompts.text_tokens", "prompts.vision_tokens", "prompts.depth", "consistency.weight")
        changes = {key: None for key in own if leaves(config)[key] is not None} | changes
    return {"method": name} | changes
