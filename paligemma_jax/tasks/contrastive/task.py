"""Trains a dual encoder on pairs of pictures and captions, with SigLIP's or CLIP's loss: the runtime's Task.

The loss is of all pairs of a batch: texts travel around the ring of devices (losses/contrastive/api.py), and batches
whose activations do not fit are embedded in micro-batches (`embed_micro_batch`). Axes: see models.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax import losses
from paligemma_jax.data.sources.captioned import FEATURES, CaptionedFeatures, CaptionedScenes, encode_scenes
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.inference import command
from paligemma_jax.losses import reference as contrastive_reference
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.variants import MINI, TINY, variant
from paligemma_jax.tasks import common
from paligemma_jax.tasks.contrastive import config as contrastive_config
from paligemma_jax.tasks.contrastive import plan as contrastive_plan
from paligemma_jax.tasks.contrastive import report as contrastive_report
from paligemma_jax.tasks.contrastive.data import Pairs
from paligemma_jax.vision_start import vision_config_of, with_vision
from paligemma_jax.weights import reader as load
from paligemma_jax.weights.fingerprint import check_digest, model_digest, write_digest
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.task import Blueprint, Task

WORDS = (TINY, f"siglip-{TINY}", MINI)  # variants that read the tiny model's words


class Contrastive(Task):
    """The task; see the module."""

    keys = contrastive_config.Keys

    def __init__(self, config: ConfigDict, mesh: Mesh):
        contrastive_config.check(config)
        self.config, self.mesh = config, mesh
        self.model_config = vision_config_of(self._sizes(), config.init.vision)
        self.tokenizer = load_text_tokenizer(self._tokenizer_path(), self.model_config.text.length)
        self.tokenizer.fits(self.model_config.text.vocab_size)
        preprocessing, vision = self.model_config.preprocessing, self.model_config.vision
        self.pairs = Pairs(config.data, self.tokenizer, preprocessing, vision)

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """The likelihood of each class for each image."""
        return command.class_lines(flags, workdir, config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Shapes of a run, for the plan command."""
        return contrastive_plan.blueprint(cls, config, mesh)

    # Model.

    def _sizes(self) -> DualEncoderConfig:
        """Of a new model by its variant, or of the one that is read."""
        config = self.config
        if config.model.path is not None:
            model = nnx.eval_shape(lambda: load.new(config.model.path, **self._options()))
            if not isinstance(model, DualEncoder):
                raise UserError(f"model.path is {config.model.path}, which is no SigLIP or CLIP: give another.")
            if config.loss.name == "sigmoid" and model.logit_bias is None:
                raise UserError(
                    f"{config.model.path} has no bias, which the sigmoid loss needs, expected loss.name=softmax for a "
                    "CLIP: set that."
                )
            return model.config
        try:
            sizes = variant(config.model.variant)
        except ValueError as error:
            raise UserError(f"model.variant: {error}") from None
        both = {name: value for name, value in self._options().items() if name != "param_dtype"}
        return sizes.replace(
            both=both,
            text={"length": config.data.text_length},
            initial_scale=float(np.log(config.init.scale)),
            initial_bias=config.init.bias if config.loss.name == "sigmoid" else None,
        )

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {
            "dtype": config.compute_dtype,
            "param_dtype": "float32",
            "remat": config.model.remat,
            "unroll": config.model.unroll,
        }

    def _tokenizer_path(self) -> str:
        """The tokenizer that is named, or lies beside the model."""
        config = self.config
        if config.tokenizer is None and config.model.path is None and config.model.variant not in WORDS:
            raise UserError(
                f"tokenizer is not set, expected the one for texts of {config.model.variant}: add "
                "--config.tokenizer=FOLDER (of a released SigLIP or CLIP)."
            )
        return config.tokenizer or config.model.path or TINY

    def init(self) -> DualEncoder:
        config = self.config
        if config.model.path is not None:
            model = load.load(config.model.path, **self._options())
        else:
            model = DualEncoder(self.model_config, rngs=nnx.Rngs(config.seed))
        return with_vision(model, config.init.vision) if config.init.vision else model

    def abstract(self) -> DualEncoder:
        """The model in shapes."""
        return nnx.eval_shape(lambda: DualEncoder(self.model_config, rngs=nnx.Rngs(0)))

    def trainable(self) -> str:
        return self.config.trainable

    def trainable_paths(self) -> list[str]:
        """Paths of the parameters that train.

        Raises:
          UserError: a pattern that matches none, or features to be kept of a tower that trains.
        """
        paths = patterns.select(self.trainable(), param_tree.abstract(self.abstract()), what="trainable parameters")
        inside = [path for path in paths if path.startswith("vision/")]
        if self.config.cache_features and inside:
            raise UserError(
                f"cache_features is on but {inside[0]} trains, which changes the image features with every step: set "
                "cache_features=False, or trainable='(image_head|text).*|logit_.*'."
            )
        return paths

    def sharding_rules(self):
        return common.SHARDING_RULES

    # Data.

    def train_source(self):
        self.trainable_paths()  # first, for what can be told of the model before scenes are rendered or encoded
        source = self.pairs.train()
        self.pairs.held_out()  # a run must not find out at its end that there is none
        return self._encoded(source) if self.config.cache_features else source

    def train_records(self):
        """What `train_source` encodes, told without the model."""
        return self.pairs.train()

    def reported_data(self) -> str | None:
        """Fingerprint of what is held out; None of scenes, which follow from the config."""
        return getattr(self.pairs.held_out(), "fingerprint", None)

    def _encoded(self, scenes) -> CaptionedFeatures:
        """The scenes with the locked tower's features."""
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
        tower = (self.model_config.vision, model_digest(start) if start else config.seed)
        return CaptionedFeatures(scenes, _features_of(scenes, tower, self.init))

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        return "\n".join(f"text {number}: {row[:16].tolist()} ..." for number, row in enumerate(batch["tokens"][0]))

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        """The pairs that count."""
        if "weight" in batch:
            return jnp.maximum(batch["weight"].sum(), 1.0)
        A, b = batch["tokens"].shape[:2]
        return jnp.float32(A * b)

    def loss(self, model: DualEncoder, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the loss summed over images; the runtime normalizes by those that are valid."""

        def embed(rows):
            if FEATURES in rows:
                images, _ = model.embed_features(rows[FEATURES])
            else:
                images, _ = model.encode_image(model.config.preprocessing.normalize(rows["image"]))
            return images, model.encode_text(rows["tokens"], rows["mask"])[0]

        rows = {name: batch[name] for name in ("image", FEATURES, "tokens", "mask") if name in batch}
        zimg, ztxt = losses.embed_in_micro_batches(embed, rows, self.config.embed_micro_batch)
        loss, metrics = self._of_pairs(model, zimg, ztxt, batch, keys)
        return loss * len(zimg), metrics

    def _of_pairs(self, model: DualEncoder, zimg, ztxt, batch, keys) -> tuple[jax.Array, Metrics]:
        settings = self.config.loss
        weight = batch.get("weight", jnp.ones(len(zimg)))
        metrics = _cosines(zimg, ztxt, weight) | {"scale": (jnp.exp(model.logit_scale[...]), jnp.float32(1.0))}
        ids = {"text_ids": batch["text_id"], "image_ids": batch["image_id"]} if settings.mask_duplicates else {}
        chunked: dict[str, Any] = {"mesh": self.mesh, "axis": ("data", "fsdp"), "chunk_size": settings.chunk_size}
        if "weight" in batch:
            chunked["valid"] = weight > 0
            metrics["good_rows"] = weight.sum(), jnp.float32(len(zimg))
        if settings.negatives is not None:
            chunked["mask"] = chosen_pairs(zimg, ztxt, settings.negatives, settings.negatives_by, keys)
        module, options = (contrastive_reference, ids) if settings.full_matrix else (losses, ids | chunked)
        scale, bias = model.logit_scale[...], model.logit_bias
        if settings.name == "softmax":
            return module.softmax_loss(zimg, ztxt, scale, **options), metrics
        if bias is None:
            return module.sigmoid_loss(zimg, ztxt, scale, jnp.zeros(()), **options), metrics
        metrics["bias"] = bias[...], jnp.float32(1.0)
        return module.sigmoid_loss(zimg, ztxt, scale, bias[...], **options), metrics

    # Evaluation.

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """What `validate` measures."""
        of_scenes = contrastive_report.ZERO_SHOT if self.config.data.name == "scenes" else ()
        return (*contrastive_report.RETRIEVAL, *of_scenes)

    def check_workdir(self, workdir: Path) -> None:
        """Compares the weights that the run starts from with those that the workdir notes.

        Raises:
          UserError: the workdir's run was started from others.
        """
        check_digest(workdir, *self._sources())

    def _sources(self) -> tuple[str | None, ...]:
        """Paths of the model and of the vision tower that the run starts from; of adapters there are none."""
        return self.config.model.path, None, self.config.init.vision

    def start(self, workdir: Path) -> None:
        """Puts the tokenizer beside the run, for `pg.load_text_tokenizer(workdir)`, and digests of where it starts."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_digest(workdir, *self._sources())
        copy_text_tokenizer(self._tokenizer_path(), workdir, self.model_config.text.length)

    def validate(self, model: DualEncoder) -> dict[str, float]:
        return contrastive_report.measure(model, self.tokenizer, self.pairs.held_out(), self.pairs.single_objects())

    @property
    def default_split(self) -> str:
        """What is held out; of scenes a name alone."""
        return self.config.data.validation_split

    def evaluate(
        self, model: DualEncoder, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """See `contrastive_report.report`.

        Raises:
          UserError: another split than what is held out.
        """
        if split not in (None, self.default_split):
            change = "" if self.config.data.name == "scenes" else ", or name it by --config.data.validation_split"
            raise UserError(
                f"split is {split!r}, expected {self.default_split!r}, what is held out: leave --split out{change}."
            )
        pairs = self.pairs.held_out()
        found = contrastive_report.report(model, self.tokenizer, pairs, self.pairs.single_objects(), workdir)
        tuning = self.pairs.tuning()
        return found if tuning is None else found | {"tuning_mean_r1": contrastive_report.mean_r1(model, tuning)}


def _cosines(zimg: jax.Array, ztxt: jax.Array, weight: jax.Array) -> Metrics:
    """Mean cosine of an image with its own text, and with any text: without a difference nothing is told apart."""
    rows = weight.sum()
    own = (zimg * ztxt).astype(jnp.float32).sum(axis=1) @ weight
    every = (weight @ zimg.astype(jnp.float32)) @ (weight @ ztxt.astype(jnp.float32))
    return {"cosine_own": (own, rows), "cosine_mean": (every / jnp.maximum(rows, 1.0), rows)}


_latest: tuple[Hashable, np.ndarray] | None = None  # the runs of a sweep begin with the same features


def _features_of(scenes: CaptionedScenes, tower: Hashable, make: Callable[[], DualEncoder]) -> np.ndarray:
    """Features of all pictures by the tower that `make` makes and `tower` tells apart; those made last are kept."""
    global _latest
    key = (scenes.folder.resolve(), scenes.num_images, tower)
    if _latest is None or _latest[0] != key:
        model = make()
        with common.progress(f"encoding {scenes.num_images} training images") as told:
            _latest = key, encode_scenes(scenes, lambda images: jax.device_get(_tower_features(model, images)), told)
    return _latest[1]


@jax.jit
def _tower_features(model: DualEncoder, images: jax.Array | np.ndarray) -> jax.Array:
    """Features [B, P, D] of images uint8 [B, I, I, 3]."""
    return model.vision(model.config.preprocessing.normalize(images))[0]


def chosen_pairs(zimg: jax.Array, ztxt: jax.Array, number: int, by: str, keys: jax.Array | None) -> jax.Array:
    """A mask bool [B, B] of the diagonal and of `number` negatives of each image (an ablation of Zhai et al. 2023).

    Args:
      zimg, ztxt: embeddings [B, D], pairs in order.
      number: negatives that are left of each image; more where some are equally hard.
      by: "random", "hard" (the most alike) or "easy" (the least).
      keys: one an image, for "random"; else not looked at.
    """
    cosines = jax.lax.stop_gradient(zimg @ ztxt.T)
    if by == "random":
        order = jax.vmap(lambda key: jax.random.uniform(key, (len(ztxt),)))(keys)
    else:
        order = cosines if by == "hard" else -cosines
    own = jnp.eye(len(zimg), dtype=bool)
    order = jnp.where(own, -jnp.inf, order)
    least = jax.lax.top_k(order, number)[0][:, -1:]
    return own | (order >= least)
