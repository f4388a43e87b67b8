"""Visual question answering: fine-tunes a PaliGemma on (image, prefix, suffix) rows, of CLEVR or a user's own.

Config keys are in config.py. Rows of training and evaluation are prepared in rows.py. Evaluation is in evaluation.py,
the reported numbers and their controls in report.py. Axes: see models.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from paligemma_jax.data.records import RecordSource, evenly_spaced
from paligemma_jax.data.sources import splits as sources
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.inference import command
from paligemma_jax.losses import loss_weights, token_cross_entropy
from paligemma_jax.losses.chunked_cross_entropy import counted_scores
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.starting_weights import StartsFromWeights
from paligemma_jax.tasks.vqa import adapter_config, consistency
from paligemma_jax.tasks.vqa import config as vqa_config
from paligemma_jax.tasks.vqa import plan as vqa_plan
from paligemma_jax.tasks.vqa.base_model import base_shapes, open_base
from paligemma_jax.tasks.vqa.evaluation import BatchMemory, VQAEvaluation
from paligemma_jax.tasks.vqa.features import FEATURES, FeatureStore, batch_features, feature_shape
from paligemma_jax.tasks.vqa.forgetting import filter_by_family
from paligemma_jax.tasks.vqa.report import report
from paligemma_jax.tasks.vqa.rows import RowProcessor, warn_of_cut_references
from paligemma_jax.tasks.vqa.trimmed import TrimmedRows
from paligemma_jax.weights.adapters.peft import load_peft, open_peft
from train_jax.core import param_tree, patterns
from train_jax.core.data_source import POSITIONS, SLOTS, DataSource, ExampleList, Lengths
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.parallel import sharding
from train_jax.step.randomness import STEP, step_key
from train_jax.task import Blueprint


class VQA(StartsFromWeights):
    """Fine-tunes a PaliGemma on questions; see the module."""

    keys = vqa_config.Keys
    op_classes = common.OP_CLASSES
    validation_metrics = ("accuracy", "loss", "examples")

    def __init__(self, config: ConfigDict, mesh: Mesh):
        """Checks the config and opens the tokenizer and the adapter; the base is read on first use."""
        vqa_config.check(config)
        super().__init__(config, mesh)
        self.tokenizer = load_tokenizer(config.tokenizer or config.model.path)
        # Opened here, so that its faults are reported before the base is read.
        self._adapter = None if config.adapter.path is None else open_peft(config.adapter.path)
        self._method = adapter_config.method_of(config.adapter)
        self._consistency = None
        if config.consistency.weight:
            self._consistency = consistency.Consistency(config.consistency, config.adapter.name, self.tokenizer)
        self._splits: dict[str, RecordSource] = {}  # opened on first use

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Returns answers to prompts about images, in the run's template."""
        return command.answer_lines(flags, workdir=workdir, config=config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the shapes of a run, for the plan command."""
        return vqa_plan.blueprint(cls, config, mesh)

    # Model.

    @functools.cached_property
    def shapes(self) -> PaliGemma:
        """The base with shapes in place of arrays."""
        shapes = base_shapes(self.config)
        self.tokenizer.fits(shapes.config.decoder.vocab_size)
        return shapes

    def base(self) -> PaliGemma:
        """Returns the model before training, without adapters, on the mesh: a new module with each call.

        A base that stays as it is is read once, and shared with the other tasks of this process. One that trains is
        read with each call, as training donates its arrays.
        """
        return nnx.clone(self._kept_base) if self._keeps_base else self._open_base()

    @property
    def _keeps_base(self) -> bool:
        return self._method is not None and self._method.keeps_base

    @functools.cached_property
    def _kept_base(self) -> PaliGemma:
        return self._open_base()

    def _open_base(self) -> PaliGemma:
        return open_base(self.config, self.mesh, self._leaf_sharding)

    def _leaf_sharding(
        self, path: str, leaf: np.ndarray | jax.Array | jax.ShapeDtypeStruct
    ) -> jax.sharding.NamedSharding:
        """Returns the sharding of a leaf of the model."""
        return sharding.shardings(self.mesh, self.sharding_rules(), {path: leaf})[0][path]

    def init(self) -> PaliGemma:
        """Returns the base with the adapters that training starts with."""
        return self._with_adapters(self.base())

    def initial_shapes(self) -> PaliGemma:
        """Returns the model of `init` with shapes in place of arrays."""
        graph, shapes = param_tree.split(self.shapes)
        return nnx.eval_shape(lambda arrays: self._with_adapters(param_tree.merge(graph, arrays)), shapes)

    def _with_adapters(self, model: PaliGemma) -> PaliGemma:
        return model if self._method is None else self.attach(model)

    def attach(self, model: PaliGemma) -> PaliGemma:
        """Attaches the adapters that training starts with, in place; use the model returned."""
        assert self._method is not None, "adapter.name=none attaches nothing"
        if self._adapter is None:
            return self._method.attach(model, nnx.Rngs(self.config.seed))
        dropout, shardings = self.config.adapter.dropout, self._leaf_sharding
        return load_peft(model, self._adapter, dtype="float32", dropout=dropout, shardings=shardings)

    def trainable(self) -> str:
        """Returns the pattern of the parameters that train."""
        return self.config.trainable or r".*" if self._method is None else self._method.trainable

    def trainable_paths(self) -> list[str]:
        """Returns the paths of the parameters that train.

        Raises:
          UserError: a pattern that matches none, or `cache_features` with a tower that trains.
        """
        what = "trainable parameters" if self._method is None else "adapters"
        paths = patterns.select(self.trainable(), param_tree.abstract(self.initial_shapes()), what=what)
        quantize.refuse_trained(paths)
        consistency.check_paths(self.config, paths)
        outside = [path for path in paths if not path.startswith("decoder/")]
        if self.config.cache_features and outside:
            raise UserError(
                f"cache_features is on but {outside[0]} trains, which changes the image features with every step: set "
                "cache_features=False."
            )
        return paths

    def sharding_rules(self) -> Sequence[tuple[str, sharding.Spec]]:
        """Returns the sharding rules of PaliGemma and its adapters."""
        return common.SHARDING_RULES

    def describe(self, model: PaliGemma) -> str:
        """Returns the adapter's table and the base's quantisation, for the start-up report."""
        if self._method is None:
            lines = [f"trains {self.trainable()!r}, no adapters"]
        else:
            lines = [self._method.describe(model)]
        if quantize.is_quantized(model):
            lines.append(quantize.describe(model))
        return "\n".join(lines)

    def parameter_counts(self, model: PaliGemma) -> dict[str, int]:
        """Returns the number of weights in the arrays of quantised kernels, for the start-up report."""
        return quantize.parameter_counts(model)

    # Data.

    @functools.cached_property
    def processor(self) -> RowProcessor:
        """Prepares rows for this model."""
        return RowProcessor(self.tokenizer, preprocessing_of(self.shapes.config), self.config.data)

    def split(self, name: str) -> RecordSource:
        """Returns the records of "train", "tune", or a split of the source."""
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

    def train_source(self) -> DataSource:
        """Returns the training rows, with image features under `cache_features`."""
        self.trainable_paths()  # first, as its errors need no images to be rendered or encoded
        records = self.split("train")
        self.split(self.config.data.validation_split)  # so that a missing split is reported before training
        if self.config.cache_features:
            limit = self.config.cache_features_mb
            source = FeatureStore(records, self.processor, self.base(), self.mesh, limit, common.progress)
        else:
            source = self.processor.guarded(records, self.processor.image_and_text)
        self._warn_of_cut_references()
        return self.trimmed(source, records) if self.config.data.buckets else source

    def trimmed(self, source: DataSource, records: RecordSource) -> TrimmedRows:
        """Returns training rows with the lengths of their texts."""
        data, decoder = self.config.data, self.shapes.config.decoder
        patches, _ = feature_shape(self.shapes)
        lengths = Lengths(
            context=patches + (0 if self._method is None else self._method.extra_inputs),
            limit=self.processor.text_limit,
            shapes=data.buckets,
            packed=data.packing,
            quadratic=decoder.attention_share,
        )
        return TrimmedRows(source, records, self.processor, lengths)

    def _warn_of_cut_references(self) -> None:
        """Warns of evaluated references that do not fit into `eval.max_new_tokens`."""
        config = self.config.eval
        reported = evenly_spaced(self.split(self.default_split), config.max_examples)
        if jax.process_index() == 0:
            for name, source in (("tune", self.split("tune")), (self.default_split, reported)):
                warn_of_cut_references(self.tokenizer, source, name, config.max_new_tokens)

    def train_records(self) -> ExampleList:
        """Returns the records that `train_source` prepares, without reading the model."""
        return ExampleList(self.split("train"))

    def reported_data(self) -> str:
        """Returns the fingerprint of the split that a run reports."""
        return self.split(self.default_split).fingerprint

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the rows of the first micro-batch, decoded, with their masks (--print_batch)."""
        first = {name: rows[0] for name, rows in batch.items() if name not in ("image", FEATURES, SLOTS, POSITIONS)}
        return prompts.format_batch(self.tokenizer, first)

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        """Returns the divisor of the summed loss: supervised tokens or rows, as `loss.reduction` says."""
        return self._weights(batch)[1]

    def _weights(self, batch) -> tuple[jax.Array, jax.Array]:
        """Returns the weights of the target tokens and the normalizer; rows of weight 0 add nothing to either."""
        mask = batch["mask_loss"][..., 1:] * batch["weight"][..., None]
        return loss_weights(mask, self.config.loss.reduction)

    def loss(self, model: PaliGemma, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the cross-entropy summed over answer tokens, with the terms of consistency, and metrics."""
        tuned = self._forward(model, batch, keys)
        weights, normalizer = self._weights(batch)
        lm_head = self._lm_head(model)
        loss = token_cross_entropy(tuned.hidden, targets=tuned.arrays["targets"], weights=weights, **lm_head)
        if self._method is not None:
            loss += normalizer * self._method.loss_term(model)  # normalizers of micro-batches add up
        metrics = {"good_rows": (batch["weight"].sum(), jnp.float32(len(batch["weight"])))}  # share of good rows
        if self._consistency is not None:
            for part, term in self._consistency.terms(model, batch, tuned, weights, keys, lm_head).items():
                loss += self.config.consistency.weight * term
                metrics[f"consistency_{part}"] = term, normalizer
        return loss, metrics

    def _forward(self, model: PaliGemma, batch, keys=None) -> consistency.TunedForward:
        noise_per_step = self._method is not None and self._method.noise_per_step
        if keys is not None and STEP in batch and noise_per_step:
            keys = jnp.broadcast_to(step_key(self.config.seed, batch[STEP][0]), keys.shape)
        arrays, features = prompts.training_arrays(batch), batch_features(model, batch, keys)
        arrays |= {name: batch[name] for name in (SLOTS, POSITIONS) if name in batch}  # of packed rows
        return consistency.TunedForward(features, model.hidden_of_texts(features, arrays, keys), arrays, keys)

    def _lm_head(self, model: PaliGemma) -> dict[str, Any]:
        """Returns the arguments of the token losses that turn hidden states into logits."""
        return {
            "embedding": model.decoder.embed_tokens.embedding[...],
            "chunk_size": self.config.loss.chunk_size,
            "vocab_chunk": self.config.loss.vocab_chunk,
            "softcap": model.decoder.config.final_softcap,
        }

    def token_loss(self, model: PaliGemma, batch) -> tuple[jax.Array, jax.Array]:
        """Returns the summed nll in nats and the number of supervised tokens of each row; never makes [b, T, V]."""
        _, hidden, arrays, _ = self._forward(model, batch)
        weights = arrays["weights"]
        scores = counted_scores(hidden, targets=arrays["targets"], counts=weights != 0, **self._lm_head(model))
        return -(scores.log_probs * weights).sum(1), weights.sum(1)

    # Evaluation.

    def starting_weights(self) -> dict[str, str | None]:
        """Returns the paths of the base, the adapters and the vision tower that training starts from."""
        config = self.config
        return {"path": config.model.path, "adapter": config.adapter.path, "vision": config.init.vision}

    def start(self, workdir: Path) -> None:
        """Writes the tokenizer and the digests of the starting weights to the workdir."""
        super().start(workdir)
        self.tokenizer.save(workdir)

    def export(self, model: PaliGemma, workdir: Path) -> None:
        """Writes the adapters, for peft and for the adapter.path of another run."""
        if self._method is not None:
            adapter_config.export(model, workdir / adapter_config.FOLDER, self._method, self.config.model.path)

    def control_runs(self) -> dict[str, ConfigDict]:
        """Returns the question-only control run: the same fine-tuning on black images."""
        enabled = self.config.eval.controls and self.config.eval.question_only
        if not enabled or self.config.data.blank_images:
            return {}
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.data.blank_images = True
            config.eval.controls = config.eval.before = False
            config.eval.captions = 0
        return {"question_only": config}

    def evaluation(self, model: PaliGemma) -> VQAEvaluation:
        """Returns the evaluation of a model by this task's config."""
        shared = self._compiled_token_loss, self._batch_memory
        return VQAEvaluation(model, self.config, self.mesh, self.processor, *shared)

    @functools.cached_property
    def _batch_memory(self) -> BatchMemory:
        return BatchMemory()

    @functools.cached_property
    def _compiled_token_loss(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """`token_loss`, compiled once, however often the run evaluates."""
        return jax.jit(self.token_loss)

    def validate(self, model: PaliGemma) -> dict[str, float]:
        """Returns accuracy and loss on the tuning split."""
        return self.evaluation(model).summary(self.split("tune"))

    def evaluate(
        self,
        model: PaliGemma,
        workdir: Path,
        split: str | None = None,
        control_results: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Evaluates a model on a split, with its controls; see report.py."""
        config, split = self.config.eval, split or self.default_split
        return report(
            self.evaluation(model),
            evenly_spaced(self.split(split), config.max_examples),
            workdir,
            split=None if split == self.default_split else split,
            training=self.split("train") if config.controls else None,
            initial_model=lambda: self._initial_model(model),
            question_only=self.control_runs().get("question_only"),
            control_results=control_results,
        )

    def _initial_model(self, model: PaliGemma) -> PaliGemma:
        """Returns the model before training: without adapters, or with those that the run started from.

        It shares every frozen array; where a part of the base trained, the base is read again.
        """
        if self._method is None or not self._method.keeps_base:
            return self.base()
        base = self._method.detach(nnx.clone(model))
        return base if self._adapter is None else self.attach(base)
