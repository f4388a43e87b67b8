"""Contrastive training of a dual encoder on pairs of images and captions, with SigLIP's or CLIP's loss.

The loss is over all pairs of a batch: texts are passed around the ring of devices (losses/contrastive/api.py), and a
batch whose activations do not fit is embedded in micro-batches (`embed_micro_batch`). Axes: see models.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from paligemma_jax import losses
from paligemma_jax.data.sources.captioned import (
    FEATURES,
    CaptionedFeatures,
    CaptionedRecords,
    CaptionedScenes,
    encode_scenes,
)
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.inference import command
from paligemma_jax.losses import reference
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.variants import MINI, TINY, variant
from paligemma_jax.tasks import common
from paligemma_jax.tasks.contrastive import config as contrastive_config
from paligemma_jax.tasks.contrastive import plan as contrastive_plan
from paligemma_jax.tasks.contrastive import report as contrastive_report
from paligemma_jax.tasks.contrastive.data import ContrastiveData
from paligemma_jax.tasks.contrastive.pair_options import pair_metrics, pair_options
from paligemma_jax.tasks.process_cache import PROCESS_CACHE
from paligemma_jax.tasks.starting_weights import StartsFromWeights
from paligemma_jax.vision_start import vision_config_of, with_vision
from paligemma_jax.weights import reader
from paligemma_jax.weights.fingerprint import model_digest
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics, row_count
from train_jax.parallel.sharding import Spec
from train_jax.task import Blueprint

TINY_TOKENIZER = (TINY, f"siglip-{TINY}", MINI)  # variants with the tiny model's tokenizer


class Contrastive(StartsFromWeights):
    """Trains a dual encoder; see the module."""

    keys = contrastive_config.Keys
    op_classes = common.OP_CLASSES

    def __init__(self, config: ConfigDict, mesh: Mesh):
        contrastive_config.check(config)
        super().__init__(config, mesh)
        model_config = vision_config_of(self._model_config(), config.init.vision)
        assert isinstance(model_config, DualEncoderConfig)
        self.model_config = model_config
        self.tokenizer = load_text_tokenizer(self._tokenizer_path(), self.model_config.text.length)
        self.tokenizer.fits(self.model_config.text.vocab_size)
        preprocessing = preprocessing_of(model_config)
        self.data = ContrastiveData(config.data, self.tokenizer, preprocessing, model_config.vision)

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Returns the likelihood of each class for each image."""
        return command.class_lines(flags, workdir, config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the shapes of a run, for the plan command."""
        return contrastive_plan.blueprint(cls, config, mesh)

    # Model.

    def _model_config(self) -> DualEncoderConfig:
        """Returns the config of a new model by its variant, or of the model to be read."""
        config = self.config
        if config.model.path is not None:
            model = nnx.eval_shape(lambda: reader.new(config.model.path, **self._options()))
            if not isinstance(model, DualEncoder):
                raise UserError(f"model.path is {config.model.path}, expected a SigLIP or CLIP: give one.")
            if config.loss.name == "sigmoid" and model.logit_bias is None:
                raise UserError(
                    f"model.path is {config.model.path}, a CLIP, which has no bias for the sigmoid loss: set "
                    "loss.name=softmax."
                )
            return model.config
        try:
            sizes = variant(config.model.variant)
        except ValueError as error:
            raise UserError(f"model.variant: {error}") from None
        return sizes.replace(
            both={name: value for name, value in self._options().items() if name != "param_dtype"},
            text={"length": config.data.text_length},
            initial_scale=float(np.log(config.init.scale)),
            initial_bias=config.init.bias if config.loss.name == "sigmoid" else None,
        )

    def _options(self) -> dict[str, Any]:
        """Returns the options with which a model is read."""
        config = self.config
        return {
            "dtype": config.compute_dtype,
            "param_dtype": "float32",
            "remat": config.model.remat,
            "unroll": config.model.unroll,
            "attention": config.model.attention,
        }

    def _tokenizer_path(self) -> str:
        """Returns the path of the tokenizer: `tokenizer`, or the one beside the model."""
        config = self.config
        if config.tokenizer is None and config.model.path is None and config.model.variant not in TINY_TOKENIZER:
            raise UserError(
                f"tokenizer is not set, expected the one for texts of {config.model.variant}: add "
                "--config.tokenizer=FOLDER (of a released SigLIP or CLIP)."
            )
        return config.tokenizer or config.model.path or TINY

    def init(self) -> DualEncoder:
        """Returns a new model, or the one at `model.path`, with the vision tower of `init.vision`."""
        config = self.config
        if config.model.path is not None:
            model = reader.load(config.model.path, **self._options())
            assert isinstance(model, DualEncoder)  # as the constructor has checked
        else:
            model = DualEncoder(self.model_config, rngs=nnx.Rngs(config.seed))
        if config.init.vision:
            model = with_vision(model, config.init.vision)
            assert isinstance(model, DualEncoder)
        return model

    def abstract(self) -> DualEncoder:
        """Returns the model with shapes in place of arrays."""
        return nnx.eval_shape(lambda: DualEncoder(self.model_config, rngs=nnx.Rngs(0)))

    def trainable(self) -> str:
        """Returns the pattern of the parameters that train."""
        return self.config.trainable

    def trainable_paths(self) -> list[str]:
        """Returns the paths of the parameters that train.

        Raises:
          UserError: a pattern that matches none, or `cache_features` with a tower that trains.
        """
        paths = patterns.select(self.trainable(), param_tree.abstract(self.abstract()), what="trainable parameters")
        inside = [path for path in paths if path.startswith("vision/")]
        if self.config.cache_features and inside:
            raise UserError(
                f"cache_features is on but {inside[0]} trains, which changes the image features with every step: set "
                "cache_features=False, or trainable='(image_head|text).*|logit_.*'."
            )
        return paths

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """Returns the sharding rules of a dual encoder."""
        return common.SHARDING_RULES

    # Data.

    def train_source(self) -> CaptionedScenes | CaptionedRecords | CaptionedFeatures:
        """Returns the training rows, with image features under `cache_features`."""
        self.trainable_paths()  # first, as its errors need no scenes to be rendered or encoded
        source = self.data.train()
        self.data.held_out()  # so that a missing split is reported before training
        return self._encoded(source) if self.config.cache_features else source

    def train_records(self) -> CaptionedScenes | CaptionedRecords:
        """Returns the rows that `train_source` encodes, without reading the model."""
        return self.data.train()

    def reported_data(self) -> str | None:
        """Returns the fingerprint of the held-out data; None for scenes, which follow from the config."""
        return self.data.held_out().fingerprint

    def _encoded(self, scenes: CaptionedScenes | CaptionedRecords) -> CaptionedFeatures:
        """Returns the scenes with the locked tower's features; the runs of a sweep share them."""
        if not isinstance(scenes, CaptionedScenes):
            raise UserError("cache_features keeps features of synthetic scenes alone: set cache_features=False.")
        config, vision = self.config, self.model_config.vision
        needed = -(-4 * scenes.num_images * vision.num_tokens * vision.width >> 20)
        if needed > config.cache_features_mb:
            raise UserError(
                f"cache_features needs {needed:,} MiB of host memory for {scenes.num_images:,} pictures, expected at "
                f"most cache_features_mb={config.cache_features_mb}: raise it, or set cache_features=False."
            )
        start = config.init.vision or config.model.path
        tower = vision, model_digest(start) if start else config.seed
        key = scenes.folder.resolve(), scenes.num_images, tower
        return CaptionedFeatures(scenes, PROCESS_CACHE.get("features", key, lambda: _encode(scenes, self.init())))

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the first tokens of each text of a batch."""
        return "\n".join(f"text {number}: {row[:16].tolist()} ..." for number, row in enumerate(batch["tokens"][0]))

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        """Returns the number of pairs, without bad rows."""
        return row_count(batch, "tokens")

    def loss(self, model: DualEncoder, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the loss summed over images; the runtime normalizes by those that are valid."""

        def embed(rows: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
            if FEATURES in rows:
                images, _ = model.embed_features(rows[FEATURES])
            else:
                images, _ = model.encode_image(common.normalize(model, rows["image"]))
            return images, model.encode_text(rows["tokens"], rows["mask"])[0]

        rows = {name: batch[name] for name in ("image", FEATURES, "tokens", "mask") if name in batch}
        zimg, ztxt = losses.embed_in_micro_batches(embed, rows, self.config.embed_micro_batch)
        metrics = pair_metrics(model, zimg, ztxt, batch)
        options = pair_options(zimg, ztxt, batch, keys, self.config.loss, self.mesh)
        module = reference if self.config.loss.full_matrix else losses
        scale = model.logit_scale[...]
        if self.config.loss.name == "softmax":
            loss = module.softmax_loss(zimg, ztxt, scale, **options)
        else:
            bias = jnp.zeros(()) if model.logit_bias is None else model.logit_bias[...]
            if model.logit_bias is not None:
                metrics["bias"] = bias, jnp.float32(1.0)
            loss = module.sigmoid_loss(zimg, ztxt, scale, bias, **options)
        return loss * len(zimg), metrics

    # Evaluation.

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `validate` returns."""
        zero_shot = contrastive_report.ZERO_SHOT if self.config.data.name == "scenes" else ()
        return (*contrastive_report.RETRIEVAL, *zero_shot)

    def starting_weights(self) -> dict[str, str | None]:
        """Returns the paths of the model and of the vision tower that the run starts from."""
        return {"path": self.config.model.path, "vision": self.config.init.vision}

    def start(self, workdir: Path) -> None:
        """Writes the tokenizer, for `pg.load_text_tokenizer(workdir)`, and the digests of the starting weights."""
        super().start(workdir)
        copy_text_tokenizer(self._tokenizer_path(), workdir, self.model_config.text.length)

    def validate(self, model: DualEncoder) -> dict[str, float]:
        """Returns retrieval and zero-shot metrics of the held-out data."""
        return contrastive_report.measure(model, self.tokenizer, self.data.held_out(), self.data.single_objects())

    @property
    def default_split(self) -> str:
        """The split of the held-out data; for scenes only a name."""
        return self.config.data.validation_split

    def evaluate(
        self, model: DualEncoder, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Evaluates a model on the held-out data, see `contrastive_report.report`.

        Raises:
          UserError: another split than that of the held-out data.
        """
        if split not in (None, self.default_split):
            change = "" if self.config.data.name == "scenes" else ", or name it by --config.data.validation_split"
            raise UserError(
                f"split is {split!r}, expected {self.default_split!r}, the held-out data: leave --split out{change}."
            )
        objects = self.data.single_objects()
        results = contrastive_report.report(model, self.tokenizer, self.data.held_out(), objects, workdir)
        tuning = self.data.tuning()
        return results if tuning is None else results | {"tuning_mean_r1": contrastive_report.mean_r1(model, tuning)}


def _encode(scenes: CaptionedScenes, model: DualEncoder) -> Float[np.ndarray, "N P D"]:
    """Returns the tower's features of all images."""
    with common.progress(f"encoding {scenes.num_images} training images") as on_progress:
        return encode_scenes(scenes, lambda images: jax.device_get(_tower_features(model, images)), on_progress)


@jax.jit
def _tower_features(model: DualEncoder, images: jax.Array | np.ndarray) -> jax.Array:
    """Returns features [B, P, D] of images uint8 [B, I, I, 3]."""
    return model.vision(common.normalize(model, images))[0]
