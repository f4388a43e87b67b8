"""Trains a dual encoder on pairs of pictures and captions, with SigLIP's or CLIP's loss: the runtime's Task.

The loss is of all pairs of a batch: texts travel around the ring of devices (contrastive_losses.py), and batches whose
activations do not fit are embedded in micro-batches (`embed_micro_batch`).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paligemma_jax import losses
from paligemma_jax.data import pretraining_set
from paligemma_jax.data.captioned import CaptionedScenes
from paligemma_jax.data.synthetic_clevr import VERSION
from paligemma_jax.data.text_tokens import load_text_tokenizer
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.dual_variants import variant
from paligemma_jax.tasks import common, contrastive_report
from paligemma_jax.vision_start import with_vision
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax import params, patterns
from train_jax.errors import UserError
from train_jax.metrics import Metrics


class Contrastive:
    """The task; see the module."""

    harmless_keys = (r"data\.(build_workers|cache_dir)", r"model\.(remat|unroll)", r"eval\..*", r"loss\.chunk_size")
    validation_metrics = (*contrastive_report.RETRIEVAL, *contrastive_report.ZERO_SHOT)
    model_keys = (r"model\..*", r"init\..*")

    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict()
        config.model = ConfigDict({"variant": "tiny", "remat": "none", "unroll": True})
        config.init = ConfigDict(
            {
                "vision": placeholder(str),  # a model whose vision tower to start from
                "scale": 10.0,  # what multiplies the cosines at first (the parameter is its logarithm)
                "bias": -10.0,  # of the sigmoid loss; about -log(batch_size) makes the first loss smallest
            }
        )
        config.trainable = ".*"  # without vision/ and image_head/ the image tower is locked (LiT)
        config.tokenizer = "tiny"
        config.loss = ConfigDict(
            {
                "name": "sigmoid",  # sigmoid (SigLIP) | softmax (CLIP)
                "chunk_size": 256,  # texts met at a time
                "mask_duplicates": True,  # a caption that two pictures of a batch share is no negative of either
            }
        )
        config.embed_micro_batch = placeholder(int)  # rows embedded at once, without activations kept; None = all
        config.data = ConfigDict(
            {
                "cache_dir": common.cache_dir(),
                "num_scenes": 4000,
                "views": 100,  # captions of a scene before they repeat
                "num_objects": (1, 4),  # fewest and most in a scene
                "num_held_out": 400,  # scenes for retrieval, and as many with a single object for zero-shot
                "build_workers": 2,
                "text_length": 64,
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh):
        common.check_choices(config, {"model.remat": common.REMAT, "loss.name": ("sigmoid", "softmax")})
        if config.micro_batch not in (None, config.batch_size):
            raise UserError(
                f"micro_batch is {config.micro_batch}, expected None: the loss is of all pairs of a batch; to save "
                "memory set embed_micro_batch."
            )
        if config.embed_micro_batch and config.batch_size % config.embed_micro_batch:
            raise UserError(
                f"batch_size={config.batch_size} does not divide into embeddings of {config.embed_micro_batch} rows: "
                "set embed_micro_batch to a divisor."
            )
        try:
            sizes = variant(config.model.variant)
        except ValueError as error:
            raise UserError(f"model.variant: {error}") from None
        both = dict(dtype=config.compute_dtype, remat=config.model.remat, unroll=config.model.unroll)
        bias = config.init.bias if config.loss.name == "sigmoid" else None
        scale = float(np.log(config.init.scale))
        text = {"length": config.data.text_length}
        self.model_config = sizes.replace(both=both, text=text, initial_scale=scale, initial_bias=bias)
        self.config, self.mesh = config, mesh
        self.tokenizer = load_text_tokenizer(config.tokenizer, config.data.text_length)
        self.tokenizer.fits(self.model_config.text.vocab_size)

    # Model.

    def init(self) -> DualEncoder:
        model = DualEncoder(self.model_config, rngs=nnx.Rngs(self.config.seed))
        return with_vision(model, self.config.init.vision) if self.config.init.vision else model

    def trainable(self) -> str:
        return self.config.trainable

    def trainable_paths(self) -> list[str]:
        """Paths of the parameters that train."""
        model = nnx.eval_shape(lambda: DualEncoder(self.model_config, rngs=nnx.Rngs(0)))
        return patterns.select(self.trainable(), params.abstract(model), what="trainable parameters")

    def sharding_rules(self):
        return common.SHARDING_RULES

    # Data.

    def scenes(self, stream: str, number: int, num_objects: tuple[int, int]) -> Path:
        """The folder of a stream's scenes, rendered on first use."""
        data, vision = self.config.data, self.model_config.vision
        low, high = num_objects
        name = f"{stream}-v{VERSION}-{vision.image_size}-{low}to{high}-{number}"
        with common.progress(f"rendering {number} {stream} scenes") as told:
            return pretraining_set.build(
                Path(data.cache_dir).expanduser() / name,
                number,
                vision.image_size,
                vision.grid,
                stream,
                data.build_workers,
                told,
                num_objects,
            )

    def train_source(self) -> CaptionedScenes:
        data = self.config.data
        return CaptionedScenes(self.scenes("captions", data.num_scenes, data.num_objects), self.tokenizer, data.views)

    def held_out(self) -> CaptionedScenes:
        """Pairs that are never trained on."""
        data = self.config.data
        return CaptionedScenes(self.scenes("captions-held-out", data.num_held_out, data.num_objects), self.tokenizer)

    def single_objects(self) -> CaptionedScenes:
        """Scenes of one object each, to be classified."""
        return CaptionedScenes(self.scenes("captions-single", self.config.data.num_held_out, (1, 1)), self.tokenizer)

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        return "\n".join(f"text {number}: {row[:16].tolist()} ..." for number, row in enumerate(batch["tokens"][0]))

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        A, b = batch["image"].shape[:2]
        return jnp.float32(A * b)

    def loss(self, model: DualEncoder, batch, keys) -> tuple[jax.Array, Metrics]:
        """Times the number of images, for the runtime divides by it."""
        del keys

        def embed(rows):
            images = model.config.preprocessing.normalize(rows["image"])
            return model(images, rows["tokens"], rows["mask"])[:2]

        rows = {name: batch[name] for name in ("image", "tokens", "mask")}
        zimg, ztxt = losses.embed_in_micro_batches(embed, rows, self.config.embed_micro_batch)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "axis": ("data", "fsdp"),
            "chunk_size": self.config.loss.chunk_size,
        }
        if self.config.loss.mask_duplicates:
            options["text_ids"] = batch["text_id"]
        scale = model.logit_scale[...]
        if self.config.loss.name == "softmax":
            loss = losses.softmax_loss(zimg, ztxt, scale, **options)
        else:
            loss = losses.sigmoid_loss(zimg, ztxt, scale, model.logit_bias[...], **options)
        metrics = {"scale": (jnp.exp(scale), jnp.float32(1.0))}
        if model.logit_bias is not None:
            metrics["bias"] = (model.logit_bias[...], jnp.float32(1.0))
        return loss * len(zimg), metrics

    # Evaluation.

    def start(self, workdir: Path) -> None:
        """Puts the tokenizer beside the run, for `pg.load_text_tokenizer(workdir)`."""
        workdir.mkdir(parents=True, exist_ok=True)
        copy_text_tokenizer(self.config.tokenizer, workdir, self.config.data.text_length)

    def validate(self, model: DualEncoder) -> dict[str, float]:
        return contrastive_report.measure(model, self.tokenizer, self.held_out(), self.single_objects())

    def evaluate(self, model: DualEncoder, workdir: Path, split: str | None = None) -> dict[str, Any]:
        return contrastive_report.report(model, self.tokenizer, self.held_out(), self.single_objects(), workdir)
