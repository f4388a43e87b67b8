"""Visual question answering: fine-tunes a PaliGemma on (image, prefix, suffix) rows, CLEVR's or a user's own.

The config's keys are in config.py. Rows are prepared in rows.py, for training and evaluation alike. Evaluation
and its controls are in evaluation.py and report.py. Axes: see models.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.adapt.quantization import quantize
from paligemma_jax.data import prompts
from paligemma_jax.data.records import Source, spread
from paligemma_jax.data.sources import splits as sources
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.inference import command
from paligemma_jax.losses import loss_weights, token_cross_entropy, token_scores
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa import adapter as vqa_adapter
from paligemma_jax.tasks.vqa import config as vqa_config
from paligemma_jax.tasks.vqa import consistency
from paligemma_jax.tasks.vqa import plan as vqa_plan
from paligemma_jax.tasks.process_cache import shared
from paligemma_jax.tasks.vqa.features import FEATURES, FeatureStore
from paligemma_jax.tasks.vqa.forgetting import filter_by_family
from paligemma_jax.tasks.vqa.lengths import warn_of_cut_references
from paligemma_jax.tasks.vqa.rows import Rows
from paligemma_jax.vision_start import with_vision
from paligemma_jax.weights.adapters.peft import open_peft
from paligemma_jax.weights.fingerprint import base_digest, check_digest, model_digest, write_digest
from paligemma_jax.weights.reader import load, stored_dtype
from train_jax.config.base import leaves
from train_jax.core import param_tree, patterns
from train_jax.core.data_source import ExampleList
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.parallel import sharding
from train_jax.step.randomness import STEP, step_key
from train_jax.task import Blueprint, Task


class VQA(Task):
    """The task; see the module."""

    resume_safe_keys = (
        # Not eval.max_new_tokens: it changes the accuracy that the best checkpoint is chosen by.
        r"eval\.(batch_size|max_examples|candidates|feature_cache_mb|controls|question_only|before|captions)",
        r"data\.(build_workers|cache_dir)",
        r"loss\.(chunk_size|vocab_chunk)",
        "cache_features(_mb)?",
        r"model\.(remat|unroll)",
    )
    validation_metrics = ("accuracy", "loss", "examples")
    architecture_keys = (r"adapter\.(?!dropout|path).*", "trainable", r"model\.quantize.*", r"init\..*")

    defaults = staticmethod(vqa_config.defaults)

    def __init__(self, config: ConfigDict, mesh: Mesh, read: Callable[..., PaliGemma] | None = None):
        """`read` makes the base model in place of weights.reader.load, called as that is; its models are not shared."""
        vqa_config.check(config)
        self.config, self.mesh, self._own_load = config, mesh, read
        self.tokenizer = load_tokenizer(config.tokenizer or config.model.path)
        # Opened here, so that its faults show before the base is read.
        self._adapter = None if config.adapter.path is None else open_peft(config.adapter.path)
        self._base: PaliGemma | None = None
        self._consistency = consistency.Consistency(self) if config.consistency.weight else None
        self._rows: Rows | None = None
        self._splits: dict[str, Source] = {}
        self.evaluation_bytes: dict[tuple, int | None] = {}  # what compiled evaluations take, see Evaluation

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Answers to prompts about images, in the run's template."""
        return command.answer_lines(flags, workdir=workdir, config=config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Shapes of a run, for the plan command."""
        return vqa_plan.blueprint(cls, config, mesh)

    # Model.

    def base(self) -> PaliGemma:
        """The model before training, without adapters, on the mesh; read once, and held in common if it is frozen."""
        if self._base is None:
            config = self.config
            if config.adapter.name == "none" or self._own_load is not None:
                self._base = self._read()  # trained arrays are donated: nobody else may hold them
            else:
                options = tuple(leaves(config.model).items())
                key = base_digest(config.model.path), options, config.compute_dtype, self.mesh, self._vision_digest()
                self._base = shared(key, self._read)
            self.tokenizer.fits(self._base.config.decoder.vocab_size)
            self._rows = Rows(self.tokenizer, self._base.config.preprocessing, config.data)
        return self._base

    def _vision_digest(self) -> str | None:
        vision = self.config.init.vision
        return None if vision is None else model_digest(vision)

    def _read(self) -> PaliGemma:
        config = self.config
        model = (self._own_load or load)(
            config.model.path,
            config.compute_dtype,
            image_size=config.model.image_size,
            param_dtype=config.model.param_dtype or self._default_param_dtype(),
            remat=config.model.remat,
            unroll=config.model.unroll,
            quantize=config.model.quantize or None,
            block_size=config.model.quantize_block_size,
            double=config.model.quantize_double,
            shardings=self._place,
        )
        if not isinstance(model, PaliGemma):
            raise UserError(
                f"model.path is {config.model.path}, which is no PaliGemma: give it as init.vision, perhaps."
            )
        return model if config.init.vision is None or self._own_load else with_vision(model, config.init.vision)

    def _place(self, path: str, leaf: np.ndarray | jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        """Where a leaf of the model lies."""
        return sharding.shardings(self.mesh, self.sharding_rules(), {path: leaf})[0][path]

    def _default_param_dtype(self) -> str:
        if self.config.adapter.name == "none":
            return "float32"
        if self.config.model.quantize:
            # Not the compute dtype: a run is evaluated and merged in others too, on the very same quantised weights.
            return stored_dtype(self.config.model.path)
        return self.config.compute_dtype

    def init(self) -> nnx.Module:
        model = self.base()
        self._base = None  # adapters are attached in place
        return model if self.config.adapter.name == "none" else self.attach(model)

    def attach(self, model: PaliGemma) -> PaliGemma:
        """Gives the base the adapters that training starts with; use what is returned."""
        return vqa_adapter.attach(model, self.config.adapter, self._adapter, self.config.seed, self._place)

    def trainable(self) -> str:
        adapter = self.config.adapter
        return self.config.trainable or r".*" if adapter.name == "none" else vqa_adapter.trainable(adapter)

    def trainable_paths(self) -> list[str]:
        """Paths of the parameters that train.

        Raises:
          UserError: a pattern that matches none, or features to be kept of a tower that trains.
        """
        model, adapter = self.base(), self.config.adapter
        if adapter.name == "none":
            paths = patterns.select(self.trainable(), param_tree.abstract(model), what="trainable parameters")
        else:
            paths = vqa_adapter.trained_paths(model, adapter, self.attach)
        quantize.refuse_trained(paths)
        consistency.check_paths(self.config, paths)
        outside = [path for path in paths if not path.startswith("decoder/")]
        if self.config.cache_features and outside:
            raise UserError(
                f"cache_features is on but {outside[0]} trains, which changes the image features with every step: set "
                "cache_features=False."
            )
        return paths

    def sharding_rules(self):
        return common.SHARDING_RULES

    def describe(self, model: PaliGemma) -> str:
        """The adapter's table for the start-up report, and what the base is stored in."""
        adapter = self.config.adapter
        none = adapter.name == "none"
        lines = [f"trains {self.trainable()!r}, no adapters" if none else vqa_adapter.describe(model, adapter)]
        return "\n".join([*lines, quantize.describe(model)] if quantize.is_quantized(model) else lines)

    def parameter_counts(self, model: PaliGemma) -> dict[str, int]:
        """Weights behind the arrays of quantised kernels, for the start-up report."""
        return quantize.parameter_counts(model)

    # Data.

    @property
    def rows(self) -> Rows:
        """What prepares rows for this model."""
        if self._rows is None:
            self.base()
        return self._rows

    def split(self, name: str) -> Source:
        """Records of "train", "tune", or a split of the source."""
        if name not in self._splits:
            data = self.config.data
            if name in ("train", "tune"):
                source = sources.open_source(data, "train", common.progress)
                if data.families:
                    source = filter_by_family(source, data)
                self._splits |= zip(("train", "tune"), sources.training_and_tuning(source, data), strict=True)
            else:
                self._splits[name] = sources.open_source(data, name, common.progress)
        return self._splits[name]

    @property
    def default_split(self) -> str:
        """The split that a run reports."""
        return self.config.data.validation_split

    def train_source(self):
        self.trainable_paths()  # first, for what can be told of the model before images are rendered or encoded
        records = self.split("train")
        self.split(self.config.data.validation_split)  # a run must not find out at its end that there is none
        if self.config.cache_features:
            limit = self.config.cache_features_mb
            source = FeatureStore(records, self.rows, self.base(), self.mesh, limit, common.progress)
        else:
            source = self.rows.guarded(records, self.rows.image_and_text)
        self._tell_cut_references()
        return source

    def _tell_cut_references(self) -> None:
        """Warns where references of what is evaluated do not fit into `eval.max_new_tokens`."""
        config = self.config.eval
        reported = spread(self.split(self.default_split), config.max_examples)
        if jax.process_index() == 0:
            for name, source in (("tune", self.split("tune")), (self.default_split, reported)):
                warn_of_cut_references(self.tokenizer, source, name, config.max_new_tokens)

    def train_records(self) -> ExampleList:
        """The rows that `train_source` prepares, told without the model."""
        return ExampleList(self.split("train"))

    def reported_data(self) -> str:
        """Fingerprint of the split that a run reports."""
        return self.split(self.default_split).fingerprint

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """The rows of the first micro-batch, decoded, with their masks (--print_batch)."""
        first = {name: rows[0] for name, rows in batch.items() if name not in ("image", FEATURES)}
        return prompts.format_batch(self.tokenizer, first)

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        return self._weights(batch)[1]

    def _weights(self, batch) -> tuple[jax.Array, jax.Array]:
        """Token weights and what their sum is divided by; rows of weight 0 count nothing."""
        mask = batch["mask_loss"][..., 1:] * batch["weight"][..., None]
        return loss_weights(mask, self.config.loss.reduction)

    def features(self, model: PaliGemma, batch, keys=None) -> jax.Array:
        """Image features of a batch, from the store or the tower."""
        if FEATURES in batch:
            return batch[FEATURES]
        return model.encode_image(model.config.preprocessing.normalize(batch["image"]), keys)[0]

    def loss(self, model: PaliGemma, batch, keys) -> tuple[jax.Array, Metrics]:
        tuned = self._tuned(model, batch, keys)
        weights, normalizer = self._weights(batch)
        loss = token_cross_entropy(tuned.hidden, targets=tuned.arrays["targets"], weights=weights, **self.words(model))
        loss += normalizer * vqa_adapter.penalty(model, self.config.adapter)  # normalizers of micro-batches add up
        metrics = {"good_rows": (batch["weight"].sum(), jnp.float32(len(batch["weight"])))}  # their share
        if self._consistency is not None:
            for part, term in self._consistency.terms(model, batch, tuned, weights, keys).items():
                loss += self.config.consistency.weight * term
                metrics[f"consistency_{part}"] = term, normalizer
        return loss, metrics

    def _tuned(self, model: PaliGemma, batch, keys=None) -> consistency.Tuned:
        if keys is not None and STEP in batch and self.config.adapter.name in vqa_adapter.DRAWN_ONCE:
            keys = jnp.broadcast_to(step_key(self.config.seed, batch[STEP][0]), keys.shape)
        arrays, features = prompts.training_arrays(batch), self.features(model, batch, keys)
        return consistency.Tuned(features, model.hidden_of_texts(features, arrays, keys), arrays, keys)

    def words(self, model: PaliGemma) -> dict[str, Any]:
        """How hidden states become probabilities of words, for the functions of losses/__init__.py."""
        return {
            "embedding": model.decoder.embed_tokens.embedding[...],
            "chunk_size": self.config.loss.chunk_size,
            "vocab_chunk": self.config.loss.vocab_chunk,
            "softcap": model.decoder.config.final_softcap,
        }

    def token_loss(self, model: PaliGemma, batch) -> tuple[jax.Array, jax.Array]:
        """Summed nll in nats and number of supervised tokens, a row each [b]; never holds [b, T, V]."""
        _, hidden, arrays, _ = self._tuned(model, batch)
        scores = token_scores(hidden, targets=arrays["targets"], **self.words(model))
        return -(scores.log_probs * arrays["weights"]).sum(1), arrays["weights"].sum(1)

    # Evaluation.

    def check_workdir(self, workdir: Path) -> None:
        """Compares the base, the adapters and the tower that the run is made of with what the workdir notes.

        Raises:
          UserError: the workdir's run was made of others.
        """
        check_digest(workdir, *self._sources())

    def start(self, workdir: Path) -> None:
        """Puts the tokenizer beside the checkpoints, and the base's digest."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_digest(workdir, *self._sources())
        self.tokenizer.save(workdir)

    def _sources(self) -> tuple[str | None, ...]:
        """Paths of the base, of the adapters that the run goes on from, and of the vision tower put in."""
        return self.config.model.path, self.config.adapter.path, self.config.init.vision

    def export(self, model: PaliGemma, workdir: Path) -> None:
        """Writes the adapters for peft, and for the adapter.path of another run."""
        if self.config.adapter.name != "none":
            vqa_adapter.export(model, workdir / vqa_adapter.FOLDER, self.config.adapter, self.config.model.path)

    def control_runs(self) -> dict[str, ConfigDict]:
        """The question-only control: the same fine-tuning on black images."""
        wanted = self.config.eval.controls and self.config.eval.question_only
        if not wanted or self.config.data.blank_images:
            return {}
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.data.blank_images = True
            config.eval.controls = config.eval.before = False
            config.eval.captions = 0
        return {"question_only": config}

    def validate(self, model: PaliGemma) -> dict[str, float]:
        from paligemma_jax.tasks.vqa.evaluation import Evaluation

        return Evaluation(self, model).summary(self.split("tune"), wanted=("generate", "loss"))

    def evaluate(
        self, model: PaliGemma, workdir: Path, split: str | None = None, control_results: dict | None = None
    ) -> dict[str, Any]:
        from paligemma_jax.tasks.vqa.report import report

        return report(self, model, workdir, split or self.default_split, control_results)
