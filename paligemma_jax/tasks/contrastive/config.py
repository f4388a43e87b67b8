"""The config keys of contrastive training, and the checks that need nothing but the config."""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.data.sources.captioned import NOISE
from paligemma_jax.models.attention import KERNELS
from paligemma_jax.tasks import common
from paligemma_jax.tasks.contrastive.data import OPENERS
from train_jax.config.base import check_declared
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir
from train_jax.core.import_path import check_named


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """`config.model`: a new dual encoder, or one to continue from."""

    variant: str = key("tiny", "sizes of a new model: tiny, siglip-b16-224, clip-b16-224, ...", architecture=True)
    path: str | None = key(
        None, "a SigLIP or CLIP to continue from instead: folder, hf://owner/name, or .npz", architecture=True
    )
    remat: str = key("none", "what the backward pass recomputes", choices=common.REMAT, resume_safe=True)
    unroll: bool = key(True, "compile the layers without a loop", resume_safe=True)
    attention: str = key(
        "auto",
        "plain; flash, which holds no matrix of scores; auto = flash on TPUs from 512 tokens on (docs/attention.md)",
        choices=KERNELS,
        resume_safe=True,
    )


@dataclasses.dataclass(frozen=True)
class InitKeys:
    """`config.init`: initial values."""

    vision: str | None = key(None, "a model whose vision tower to start from", architecture=True)
    scale: float = key(
        10.0, "new models: factor of the cosines at first (the parameter is its logarithm)", architecture=True
    )
    bias: float | None = key(
        -10.0, "new models: of the sigmoid loss, near -log(batch_size); None = no bias is learned", architecture=True
    )


@dataclasses.dataclass(frozen=True)
class LossKeys:
    """`config.loss`: which loss, and of which pairs (docs/contrastive.md)."""

    name: str = key("sigmoid", "sigmoid is SigLIP's, softmax CLIP's", choices=("sigmoid", "softmax"))
    chunk_size: int = key(256, "texts whose logits exist at one time", resume_safe=True)
    full_matrix: bool = key(False, "the plain form, which holds the logits of all pairs: a reference")
    mask_duplicates: bool = key(True, "equal captions, and captions of equal images, are no negatives of each other")
    negatives: int | None = key(None, "of each image, that count; None = all. Costs a matrix of all pairs")
    negatives_by: str = key("random", "which ones", choices=("random", "hard", "easy"))


@dataclasses.dataclass(frozen=True)
class SourceKeys:
    """`config.data`: pairs of images and texts."""

    name: str = key("scenes", "scenes (synthetic), jsonl, tfds, or an import path of your own")
    views: int = key(100, "captions of a scene, or of an example of TFDS, before they repeat")
    text_length: int = key(64, "tokens, of a new model; one that is read has its own")
    source: str | None = key(None, "jsonl and tfds: the folder")
    split: str = key("train", "jsonl and tfds: to train on")
    validation_split: str = key("validation", "jsonl and tfds: to evaluate on")
    image: str = key("image", "tfds: key of the image")
    caption: str = key("caption", "tfds: key of the text; captions/text of nested features")
    max_held_out: int = key(5000, "pairs of the validation split that retrieval is measured on")
    cache_dir: str = key(cache_dir, "folder for rendered scenes", resume_safe=True)
    num_scenes: int = key(4000, "synthetic scenes to train on")
    num_objects: tuple = key((1, 4), "fewest and most objects in a scene")
    num_held_out: int = key(400, "scenes for retrieval, and as many with a single object for zero-shot")
    num_tuning: int = key(0, "further scenes that tuning_mean_r1 is measured on, to choose settings by")
    build_workers: int = key(2, "processes that render", resume_safe=True)
    noise: str = key("", "what is corrupted in training, in a share of the rows", choices=("", *NOISE))
    noise_share: float = key(0.0, "that share", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the task."""

    model: ModelKeys = section(ModelKeys)
    init: InitKeys = section(InitKeys)
    trainable: str = key(".*", "pattern of parameter paths; without vision/ and image_head/ the tower is locked (LiT)")
    tokenizer: str | None = key(None, "its folder or file; None = beside model.path, or the tiny model's")
    cache_features: bool = key(False, "encode each training image once; exact while vision/ is locked, costs memory")
    cache_features_mb: int = key(2048, "host memory for that, MiB; data that need more stop the run at its start")
    loss: LossKeys = section(LossKeys)
    embed_micro_batch: int | None = key(None, "rows embedded at once, without activations kept; None = all")
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
            "jsonl or tfds."
        )
    if config.data.name != "scenes" and config.data.source is None:
        raise UserError(f"data.name is {config.data.name!r} but data.source is not set: add --config.data.source=PATH.")
    if config.data.name != "scenes" and config.data.num_tuning:
        raise UserError(f"data.num_tuning is {config.data.num_tuning}, which is for data.name=scenes: set it to 0.")
    if config.data.name != "scenes" and config.data.noise:
        raise UserError(f"data.noise is {config.data.noise!r}, which is for data.name=scenes: set it to ''.")
    if config.loss.negatives is not None and not 1 <= config.loss.negatives < config.batch_size:
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
