"""The config keys of contrastive training, and the checks that need nothing but the config."""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.data.sources.captioned import NOISE
from paligemma_jax.tasks.common import FeatureCacheKeys, StackKeys
from paligemma_jax.tasks.contrastive.data import OPENERS
from paligemma_jax.tasks.rendered import CaptionKeys
from train_jax.config.base import check_declared
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_named


@dataclasses.dataclass(frozen=True)
class ModelKeys(StackKeys):
    """`config.model`: a new dual encoder, or one to continue from."""

    variant: str = key("tiny", "sizes of a new model: tiny, siglip-b16-224, clip-b16-224, ...", architecture=True)
    path: str | None = key(
        None,
        "SigLIP or CLIP from which training continues: folder, hf://owner/name, or .npz; None = a new model",
        architecture=True,
    )


@dataclasses.dataclass(frozen=True)
class InitKeys:
    """`config.init`: initial values."""

    vision: str | None = key(
        None, "model whose vision tower the run starts from; None = the model's own", architecture=True
    )
    scale: float = key(
        10.0,
        "initial factor of the cosines in a new model, whose parameter is the logarithm of it",
        above=0,
        architecture=True,
    )
    bias: float | None = key(
        -10.0,
        "initial bias of the sigmoid loss in a new model, best near -log(batch_size); None = no bias is learned",
        architecture=True,
    )


@dataclasses.dataclass(frozen=True)
class LossKeys:
    """`config.loss`: which loss, and of which pairs (docs/contrastive.md)."""

    name: str = key(
        "sigmoid", "loss of all pairs of a batch: SigLIP's sigmoid or CLIP's softmax", choices=("sigmoid", "softmax")
    )
    chunk_size: int | None = key(
        None,
        "number of texts whose logits exist at one time; None = 256, on TPUs 2048",
        minimum=1,
        resume_safe=True,
    )
    full_matrix: bool = key(
        False, "whether the plain loss is used, which holds the logits of all pairs and is the reference for the other"
    )
    mask_duplicates: bool = key(
        True, "whether equal captions, and captions of equal images, are left out of each other's negatives"
    )
    negatives: int | None = key(
        None,
        "number of negatives of each image; None = all. A number takes the memory of a matrix of all pairs",
        minimum=1,
    )
    negatives_by: str = key(
        "random",
        "how these negatives are chosen: at random, or those most (hard) or least (easy) similar to the image",
        choices=("random", "hard", "easy"),
    )


@dataclasses.dataclass(frozen=True)
class SourceKeys(CaptionKeys):
    """`config.data`: pairs of images and texts."""

    name: str = key("scenes", "the data: scenes (synthetic), jsonl, tfds, or the import path of your own function")
    text_length: int = key(64, "number of tokens of a text in a new model; one that is read has its own", minimum=2)
    source: str | None = key(None, "folder of jsonl or tfds")
    split: str = key("train", "name of the split of jsonl or tfds to train on")
    validation_split: str = key("validation", "name of the split of jsonl or tfds to evaluate on")
    image: str = key("image", "key of the image in an example of tfds")
    caption: str = key("caption", "key of the caption in an example of tfds; captions/text in nested features")
    max_held_out: int = key(
        5000, "largest number of pairs of the validation split on which retrieval is measured", minimum=1
    )
    num_scenes: int = key(4000, "number of synthetic scenes to train on", minimum=1)
    num_objects: tuple[int, int] = key(
        (1, 4), "smallest and largest number of objects in a scene", minimum=1, maximum=10
    )
    num_held_out: int = key(
        400,
        "number of scenes for retrieval, and of scenes with a single object for zero-shot classification",
        minimum=1,
    )
    num_tuning: int = key(
        0, "number of further scenes on which tuning_mean_r1 is measured, to choose settings by", minimum=0
    )
    noise: str = key(
        "",
        "what is corrupted in some of the training rows: images, texts, or which text belongs to which image "
        "(pairs); '' = nothing",
        choices=("", *NOISE),
    )
    noise_share: float = key(0.0, "share of the training rows that is corrupted", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class Keys(FeatureCacheKeys):
    """The keys of the task."""

    model: ModelKeys = section(lambda: ModelKeys(unroll=True))
    init: InitKeys = section(InitKeys)
    trainable: str = key(
        ".*", "pattern of the parameters that train; one without vision/ and image_head/ locks the tower (LiT)"
    )
    tokenizer: str | None = key(
        None, "folder or file of the tokenizer; None = beside model.path, or that of the tiny model"
    )
    loss: LossKeys = section(LossKeys)
    embed_micro_batch: int | None = key(
        None,
        "number of rows that are embedded at once, without keeping their activations; None = all of the batch",
        minimum=1,
    )
    data: SourceKeys = section(SourceKeys)


def check(config: ConfigDict) -> None:
    """Checks values on their own, before anything is read.

    Raises:
      UserError: the first fault found.
    """
    check_declared(config)
    check_named("data.name", config.data.name, ("scenes", *OPENERS))
    if config.micro_batch not in (None, config.batch_size):
        raise UserError(
            f"micro_batch is {config.micro_batch}, expected None: the loss is of all pairs of a batch; to save memory "
            "set embed_micro_batch."
        )
    if config.embed_micro_batch and config.batch_size % config.embed_micro_batch:
        raise UserError(
            f"batch_size={config.batch_size} does not divide into embeddings of {config.embed_micro_batch} rows: set "
            "embed_micro_batch to a divisor."
        )
    if config.data.name == "scenes" and config.data.source is not None:
        raise UserError(
            f"data.source is {config.data.source!r} but data.name is 'scenes', which are rendered: set data.name to "
            "jsonl, tfds or the import path of your own function."
        )
    if config.data.name in OPENERS and config.data.source is None:
        raise UserError(f"data.name is {config.data.name!r} but data.source is not set: add --config.data.source=PATH.")
    if config.data.name != "scenes" and config.data.num_tuning:
        raise UserError(f"data.num_tuning is {config.data.num_tuning}, which is for data.name=scenes: set it to 0.")
    if config.data.name != "scenes" and config.data.noise:
        raise UserError(f"data.noise is {config.data.noise!r}, which is for data.name=scenes: set it to ''.")
    if config.data.num_objects[0] > config.data.num_objects[1]:
        raise UserError(
            f"data.num_objects is {config.data.num_objects}, expected the fewest objects before the most, such as "
            "(1, 4): change it."
        )
    if config.loss.negatives is not None and config.loss.negatives >= config.batch_size:
        raise UserError(
            f"loss.negatives is {config.loss.negatives}, expected 1 to {config.batch_size - 1}, one fewer than the "
            "batch: change it."
        )
    if config.loss.full_matrix and (config.loss.negatives is not None or config.data.name != "scenes"):
        raise UserError(
            "loss.full_matrix compares the loss of all pairs of synthetic scenes, expected no loss.negatives and "
            "data.name=scenes with it: set loss.full_matrix=False."
        )
    if config.loss.name == "softmax" and config.loss.negatives is not None:
        raise UserError(
            "loss.negatives leaves pairs out of the sigmoid loss, but loss.name is 'softmax': set loss.negatives=None."
        )
