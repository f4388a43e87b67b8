"""The config keys of contrastive training: defaults, and the checks that need nothing but the config."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paligemma_jax.data.sources.captioned import NOISE
from paligemma_jax.tasks import common
from paligemma_jax.tasks.contrastive.data import OPENERS
from train_jax.config.base import check_choices
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir
from train_jax.core.import_path import check_named

CHOICES = {
    "model.remat": common.REMAT,
    "loss.name": ("sigmoid", "softmax"),
    "loss.negatives_by": ("random", "hard", "easy"),
    "data.noise": ("", *NOISE),
}


def defaults() -> ConfigDict:
    """The keys of the task with their defaults."""
    config = ConfigDict()
    config.model = ConfigDict(
        {
            "variant": "tiny",  # sizes of a new model: tiny, siglip-b16-224, clip-b16-224, ...
            "path": placeholder(str),  # a SigLIP or CLIP to go on from instead: folder, hf://owner/name, or .npz
            "remat": "none",
            "unroll": True,
        }
    )
    config.init = ConfigDict(
        {
            "vision": placeholder(str),  # a model whose vision tower to start from
            "scale": 10.0,  # of a new model: what multiplies the cosines at first (the parameter is its logarithm)
            "bias": placeholder(float),  # of its sigmoid loss, near -log(batch_size); None = no bias is learned
        }
    )
    config.init.bias = -10.0
    config.trainable = ".*"  # without vision/ and image_head/ the image tower is locked (LiT)
    config.tokenizer = placeholder(str)  # its folder or file; None = beside model.path, or the tiny model's
    config.cache_features = False  # encode each training image once; exact while vision/ is locked, costs memory
    config.cache_features_mb = 2048  # host memory that may cost, MiB; data that need more stop the run at its start
    config.loss = ConfigDict(
        {
            "name": "sigmoid",  # sigmoid (SigLIP) | softmax (CLIP)
            "chunk_size": 256,  # texts met at a time
            "full_matrix": False,  # the textbook form, which holds all pairs at once: to compare with
            "mask_duplicates": True,  # equal captions, and captions of equal pictures, are no negatives of each other
            "negatives": placeholder(int),  # of each image, that count; None = all. Costs a matrix of all pairs
            "negatives_by": "random",  # random | hard | easy: which ones
        }
    )
    config.embed_micro_batch = placeholder(int)  # rows embedded at once, without activations kept; None = all
    config.data = ConfigDict(
        {
            "name": "scenes",  # scenes (synthetic) | jsonl | tfds
            "views": 100,  # captions of a scene, or of an example of TFDS, before they repeat
            "text_length": 64,  # tokens, of a new model; one that is read has its own
            # jsonl and tfds:
            "source": placeholder(str),  # the folder
            "split": "train",
            "validation_split": "validation",
            "image": "image",  # key of the picture, of tfds
            "caption": "caption",  # key of the text; of nested features "captions/text"
            "max_held_out": 5000,  # pairs of the validation split that retrieval looks through
            # Synthetic scenes:
            "cache_dir": cache_dir(),
            "num_scenes": 4000,
            "num_objects": (1, 4),  # fewest and most in a scene
            "num_held_out": 400,  # scenes for retrieval, and as many with a single object for zero-shot
            "num_tuning": 0,  # further scenes, of which `tuning_mean_r1` is: to choose settings by, as of a grid
            "build_workers": 2,
            "noise": "",  # images | texts | pairs: what is spoilt in training, of a share of the rows
            "noise_share": 0.0,
        }
    )
    return config


def check(config: ConfigDict) -> None:
    """Checks values on their own, before anything is read.

    Raises:
      UserError: the first fault found.
    """
    check_choices(config, CHOICES)
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
        raise UserError(f"data.source is {config.data.source!r} of synthetic scenes: set data.name to jsonl or tfds.")
    if config.data.name != "scenes" and config.data.source is None:
        raise UserError(f"data.name is {config.data.name!r} but data.source is not set: add --config.data.source=PATH.")
    if config.data.name != "scenes" and config.data.num_tuning:
        raise UserError("data.num_tuning renders synthetic scenes to choose settings by: set data.num_tuning=0.")
    if config.data.name != "scenes" and config.data.noise:
        raise UserError("data.noise spoils synthetic scenes alone: set data.noise=''.")
    if not 0 <= config.data.noise_share <= 1:
        raise UserError(f"data.noise_share is {config.data.noise_share}, expected a share from 0 to 1: change it.")
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
