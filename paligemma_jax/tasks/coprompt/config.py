"""The config keys of few-shot tuning, checks that need nothing but the config, and the method they name."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.adapt.few_shot.learned_prompts import TRAINABLE
from paligemma_jax.adapt.few_shot.methods import FEW_SHOT_METHODS, FewShotMethod, few_shot_method
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.few_shot.openers import OPENERS
from paligemma_jax.data.synthetic_clevr.classes import COMBINATIONS, HALVES, IN_CAPTIONS, WORDS
from paligemma_jax.data.synthetic_clevr.styles import PLAIN, STYLES
from paligemma_jax.images import augment
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.losses.coprompt import DISTANCES, SIDES
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.tasks.common import StackKeys
from paligemma_jax.tasks.rendered import RenderKeys
from train_jax.config.base import check_declared, leaves
from train_jax.core.config_keys import key, optional_keys, section
from train_jax.core.errors import UserError, quoted
from train_jax.core.import_path import check_named

FULL_RATE = 0.1  # of the learning rate, where all weights train


@dataclasses.dataclass(frozen=True)
class ModelKeys(StackKeys):
    """`config.model`: the base."""

    path: str = key(
        "tiny-siglip",
        "the SigLIP or CLIP to tune: folder, hf://owner/name, .npz, or a name that ships with the package",
        architecture=True,
    )


@dataclasses.dataclass(frozen=True)
class ConsistencyKeys:
    """`config.consistency`: with the frozen base."""

    weight: float | None = key(
        None,
        "weight of consistency with the frozen model in the loss, the paper's lambda; None = 1 for method coprompt, "
        "0 for all others",
        minimum=0,
    )
    kind: str = key("cosine", "distance of tuned and frozen embeddings", choices=DISTANCES)
    on: str = key("both", "whose embeddings are kept consistent", choices=SIDES)
    perturb: bool = key(
        True,
        "whether the frozen model reads descriptions of the classes and a view of the image of its own, or else the "
        "inputs of the tuned model",
    )


@dataclasses.dataclass(frozen=True)
class SourceKeys(RenderKeys):
    """`config.data`: classes and their images (docs/few_shot.md)."""

    name: str = key(
        "scenes", "the data: scenes (synthetic classes), images (folders), or the import path of your own function"
    )
    descriptions: str | None = key(
        None,
        "JSON file {class: [sentences]} that the frozen model reads; None = the descriptions of the synthetic classes",
    )
    source: str | None = key(None, "folder of images, as class folders or in CoOp's layout")
    targets: tuple[str, ...] = key(
        (), "folders of further images to test on, for cross_dataset and domain_generalization"
    )
    style: str = key(PLAIN, "style of the synthetic scenes that the run is tuned and tested on", choices=STYLES)
    novel: str = key(COMBINATIONS, "what distinguishes the novel classes of synthetic scenes", choices=HALVES)
    words: str = key(
        IN_CAPTIONS,
        "words of the names of synthetic classes: those of the captions that the small SigLIP was trained on, or "
        "others",
        choices=WORDS,
    )
    target_styles: tuple[str, ...] = key(
        (), "further styles of the synthetic scenes to test on, for domain_generalization", choices=STYLES
    )
    per_class: tuple[int, int, int] = key(
        (16, 4, 10), "numbers of synthetic images of a class: to draw shots from, to validate on, to test on", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class ViewKeys:
    """`config.views`: augmentation of the images of either branch, see images/augment.py."""

    tuned: Augmentation = section(lambda: augment.SCENES_LIGHT)
    frozen: Augmentation = section(lambda: augment.SCENES_STRONG)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the task."""

    model: ModelKeys = section(ModelKeys)
    tokenizer: str | None = key(None, "folder or file of the tokenizer; None = beside model.path")
    method: str = key(
        "coprompt", "few-shot method, which decides what is tuned", choices=FEW_SHOT_METHODS, architecture=True
    )
    prompts: Any = section(optional_keys(PromptConfig, "the method's own"), architecture=True)
    init_words: str | None = key(
        "a photo of a",
        "words whose embeddings are the initial learned tokens of the first layer of the text tower; None = random",
    )
    template: str = key("a photo of a {}.", "text of a class, with {} in place of its name")
    consistency: ConsistencyKeys = section(ConsistencyKeys)
    protocol: str = key(
        "base_to_novel",
        "which classes and data sets the run is tuned on and tested on (docs/few_shot.md)",
        choices=protocols.PROTOCOL_KINDS,
    )
    shots: int = key(16, "number of training images of a class, drawn by the seed", minimum=1)
    data: SourceKeys = section(SourceKeys)
    views: ViewKeys = section(ViewKeys)


def check(config: ConfigDict) -> None:
    """Checks values on their own, before anything is read.

    Raises:
      UserError: the first fault found.
    """
    check_declared(config)
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
    check_named("data.name", config.data.name, OPENERS)
    if config.data.name == "scenes":
        _check_scenes(config)
    if config.data.name == "images":
        _check_images(config)
    if config.data.name != "scenes":
        _check_descriptions(config)


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
        raise UserError(
            f"data.source is {data.source!r} and data.name is 'scenes', whose images are rendered, expected no folder: "
            "set data.name=images, or leave data.source out."
        )
    if config.protocol == "cross_dataset":
        raise UserError(
            "protocol is 'cross_dataset' and data.name is 'scenes', which is one data set, expected several: choose "
            "another protocol, or set data.name=images."
        )
    if bool(data.target_styles) != (config.protocol in protocols.ACROSS) or data.targets:
        raise UserError(
            f"data.target_styles is {data.target_styles}, data.targets is {data.targets} and protocol is "
            f"{config.protocol!r}, but synthetic classes take target styles with domain_generalization only, and never "
            "targets: change one of the three."
        )
    if data.style in data.target_styles:
        raise UserError(
            f"data.target_styles is {data.target_styles}, which holds data.style={data.style!r}, expected styles that "
            "the run is not tuned on: change one of the two."
        )


def _check_images(config: ConfigDict) -> None:
    data = config.data
    if data.source is None:
        raise UserError("data.name is 'images' but data.source is not set: add --config.data.source=FOLDER.")
    if bool(data.targets) != (config.protocol in protocols.ACROSS) or data.target_styles:
        raise UserError(
            f"data.targets is {data.targets}, data.target_styles is {data.target_styles} and protocol is "
            f"{config.protocol!r}, but images take targets with {' and '.join(protocols.ACROSS)} only, and never "
            "target styles: change one of the three."
        )


def _check_descriptions(config: ConfigDict) -> None:
    """Raises UserError where the frozen branch reads descriptions and the config names none."""
    if needs_descriptions(config) and config.data.descriptions is None:
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
