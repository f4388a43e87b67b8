"""Visual question answering: fine-tunes a PaliGemma on (image, prefix, suffix) rows, CLEVR's or a user's own.

The prompt, its masks and its truncation come from data/prompts.py, for training and evaluation alike. Evaluation and
its controls are in vqa_evaluation.py and vqa_report.py. Axes: models/layers.py.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paligemma_jax.adapt import lora
from paligemma_jax.data import prompts, sources
from paligemma_jax.data.images import Preprocessing
from paligemma_jax.data.records import BadRow, GuardedSource, Record, Source
from paligemma_jax.data.tokenizer import load_tokenizer
from paligemma_jax.losses import loss_weights, token_cross_entropy, token_scores
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.features import FeatureStore, encode_images
from paligemma_jax.weights.load import load
from train_jax import params, patterns
from train_jax.errors import UserError
from train_jax.metrics import Metrics

FEATURES = "features"
ADAPTERS = ("lora", "none")


class VQA:
    """The task; see the module."""

    harmless_keys = (
        r"eval\..*",
        r"data\.(build_workers|cache_dir)",
        r"loss\.(chunk_size|vocab_chunk)",
        "cache_features",
        r"model\.(remat|unroll)",
    )
    model_keys = (r"adapter\.(name|targets|rank|alpha|rslora)", "trainable")

    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict()
        config.model = ConfigDict(
            {
                "path": "tiny",  # a Hugging Face folder, a big_vision .npz, or "tiny" (ships with the package)
                "image_size": placeholder(int),  # None = the checkpoint's own; else positions are resampled
                "remat": "block",  # none | block | dots: what the backward pass recomputes
                "unroll": False,  # compile the layers without a loop: faster steps on CPU, slower to compile
                "param_dtype": placeholder(str),  # of the weights; None = compute_dtype if frozen, float32 if trained
            }
        )
        config.tokenizer = placeholder(str)  # folder or tokenizer.model; None = beside the model
        config.adapter = ConfigDict(
            {
                "name": "lora",  # lora | none (trains what `trainable` says)
                "targets": r"decoder/.*/(q_proj|o_proj)",  # r".*/(q_proj|o_proj)" also adapts the tower, as peft does
                "rank": 8,
                "alpha": 32.0,
                "dropout": 0.1,
                "rslora": False,
            }
        )
        config.trainable = placeholder(str)  # pattern of parameter paths, for adapter "none"; None = all
        config.cache_features = False  # encode each training image once; exact while the tower is frozen, costs memory
        config.data = ConfigDict(
            {
                "name": "synthetic_clevr",  # synthetic_clevr | clevr | parquet | jsonl, see docs/data.md
                "source": placeholder(str),  # where the data lie; synthetic_clevr needs none
                "cache_dir": common.cache_dir(),
                "build_workers": 2,  # processes that render
                "prompt": "answer en {question}",  # PaliGemma's prefix for questions in English; jsonl brings its own
                "blank_images": False,  # the question-only control: same run, black images
                "fraction": 1.0,  # of the training questions
                "subset_seed": 42,  # draws that fraction (not the permutation of the `datasets` library)
                "tune_fraction": 0.05,  # of the training images, kept apart to choose the checkpoint by; at least one
                "tune_examples": 300,  # questions on those images, at most
                "validation_split": "validation",
                "prefix_length": 64,  # tokens of BOS + prompt + separator
                "suffix_length": 16,  # tokens of the answer with its EOS
                "on_truncation": "raise",  # raise | skip (a bad row): a text that does not fit is never cut
                # Synthetic scenes only:
                "image_size": 96,
                "num_train_scenes": 1000,
                "num_validation_scenes": 210,
                "questions_per_scene": 10,
                "scene_seed": 0,
            }
        )
        config.loss = ConfigDict(
            {
                "reduction": "token_mean",  # token_mean (transformers) | example_mean (big_vision)
                "chunk_size": 256,  # tokens whose logits exist at one time
                "vocab_chunk": placeholder(int),  # words whose logits exist at one time; None = all
            }
        )
        config.eval = ConfigDict(
            {
                "batch_size": 50,  # questions at once, at most; shrinks where the device has less memory
                "max_new_tokens": 16,
                "max_examples": placeholder(int),  # None = all of the split
                "candidates": "clevr",  # "clevr": the 28 answers; "": no likelihood scoring; else answers joined by |
                "feature_cache_mb": 64,  # image features kept between questions on the same image
                "controls": True,  # the blind controls: shuffled images, most frequent answer, question only
                "before": True,  # the model before training, by likelihood
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh):
        self.config, self.mesh = config, mesh
        if config.adapter.name not in ADAPTERS:
            raise UserError(f"adapter.name is {config.adapter.name!r}, expected one of {', '.join(ADAPTERS)}.")
        if config.loss.reduction not in ("token_mean", "example_mean"):
            raise UserError(f"loss.reduction is {config.loss.reduction!r}, expected 'token_mean' or 'example_mean'.")
        if config.data.on_truncation not in ("raise", "skip"):
            raise UserError(f"data.on_truncation is {config.data.on_truncation!r}, expected 'raise' or 'skip'.")
        if config.adapter.name != "none" and config.trainable is not None:
            raise UserError(
                f"trainable is {config.trainable!r} beside adapter.name={config.adapter.name!r}, which decides what "
                "trains, expected one of the two: set trainable=None or adapter.name=none."
            )
        self.tokenizer = load_tokenizer(config.tokenizer or config.model.path)
        self._base: PaliGemma | None = None
        self._preprocessing: Preprocessing | None = None
        self._splits: dict[str, Source] = {}

    # Model.

    def base(self) -> PaliGemma:
        """The model before training, without adapters; read once."""
        if self._base is None:
            config = self.config
            trained = config.adapter.name == "none"
            self._base = load(
                config.model.path,
                config.compute_dtype,
                image_size=config.model.image_size,
                param_dtype=config.model.param_dtype or ("float32" if trained else config.compute_dtype),
                remat=config.model.remat,
                unroll=config.model.unroll,
            )
            self.tokenizer.fits(self._base.config.decoder.vocab_size)
            self._preprocessing = self._base.config.preprocessing
        return self._base

    def init(self) -> nnx.Module:
        model, adapter = self.base(), self.config.adapter
        self._base = None  # adapters are attached in place; who asks again reads again
        if adapter.name == "lora":
            lora.attach_lora(
                model,
                adapter.targets,
                adapter.rank,
                adapter.alpha,
                adapter.dropout,
                rslora=adapter.rslora,
                rngs=nnx.Rngs(self.config.seed),
            )
        return model

    def trainable(self) -> str:
        return lora.TRAINABLE if self.config.adapter.name == "lora" else self.config.trainable or r".*"

    def sharding_rules(self):
        return common.SHARDING_RULES

    def describe(self, model: PaliGemma) -> str:
        """The adapter's table for the start-up report."""
        rows = lora.lora_table(model)
        return lora.format_lora_table(rows) if rows else f"trains {self.trainable()!r}, no adapters"

    # Data.

    def split(self, name: str) -> Source:
        """Records of "train", "tune", or a split of the source."""
        if name not in self._splits:
            data = self.config.data
            if name in ("train", "tune"):
                source = sources.open_source(data, "train", common.progress)
                self._splits |= zip(("train", "tune"), sources.training_and_tuning(source, data), strict=True)
            else:
                self._splits[name] = sources.open_source(data, name, common.progress)
        return self._splits[name]

    @property
    def default_split(self) -> str:
        """The split that a run reports."""
        return self.config.data.validation_split

    def train_source(self):
        model = self.base()  # first, for what can be told of it before images are rendered or encoded
        self._check_what_trains(model)
        records = self.split("train")
        self.split(self.config.data.validation_split)  # a run must not find out at its end that there is none
        if not self.config.cache_features:
            return self.guarded(records, self._prepare)
        encode = functools.partial(encode_images, model)
        return FeatureStore(records, self.guarded, self.prepare_text, self.prepare_image, encode, common.progress)

    def _prepare(self, record: Record) -> dict[str, np.ndarray]:
        return self.prepare_image(record) | self.prepare_text(record)

    def _check_what_trains(self, model: PaliGemma) -> None:
        adapter = self.config.adapter
        if adapter.name == "lora":
            trained = patterns.select(adapter.targets, lora.projections(model), what="lora targets")
        else:
            trained = patterns.select(self.trainable(), params.abstract(model), what="trainable parameters")
        outside = [path for path in trained if not path.startswith("decoder/")]
        if self.config.cache_features and outside:
            raise UserError(
                f"cache_features is on but {outside[0]} trains, which changes the image features with every step: set "
                "cache_features=False."
            )

    def guarded(self, source: Source, prepare, max_bad_fraction: float | None = None) -> GuardedSource:
        """A source whose bad rows keep their slot with weight 0 (or stop the run, as the config says)."""
        data = self.config.data
        return GuardedSource(
            source,
            prepare,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
            policies={prompts.TruncationError: data.on_truncation},
        )

    def prepare_text(self, record: Record) -> dict[str, np.ndarray]:
        """Tokens [T + 1] and masks of a training row."""
        data = self.config.data
        return prompts.make_example(
            self.tokenizer,
            record.prefix,
            record.suffix,
            data.prefix_length + data.suffix_length - 1,
            prefix_length=data.prefix_length,
            suffix_length=data.suffix_length,
        )

    def prepare_prompt(self, record: Record) -> dict[str, np.ndarray]:
        """Tokens [prefix_length] and masks of a row to be answered."""
        length = self.config.data.prefix_length
        return prompts.make_example(self.tokenizer, record.prefix, None, length, prefix_length=length)

    def prepare_image(self, record: Record) -> dict[str, np.ndarray]:
        """The record's picture, resized to the model's input, uint8 [I, I, 3]."""
        preprocessing = self._preprocessing or self.base().config.preprocessing
        try:
            pixels = preprocessing.resize(preprocessing.decode(record.image))
        except BadRow as error:
            raise BadRow(f"{record.image_name}: {error}") from error
        return {"image": np.zeros_like(pixels) if self.config.data.blank_images else pixels}

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
        flat, normalizer = loss_weights(mask.reshape(-1, mask.shape[-1]), self.config.loss.reduction)
        return flat.reshape(mask.shape), normalizer

    def features(self, model: PaliGemma, batch, keys=None) -> jax.Array:
        """Image features of a batch, from the store or the tower."""
        if FEATURES in batch:
            return batch[FEATURES]
        return model.encode_image(model.config.preprocessing.normalize(batch["image"]), keys)[0]

    def loss(self, model: PaliGemma, batch, keys) -> tuple[jax.Array, Metrics]:
        hidden, arrays = self._hidden(model, batch, keys)
        weights, _ = self._weights(batch)
        config, decoder = self.config.loss, model.decoder
        loss = token_cross_entropy(
            hidden,
            decoder.embed_tokens.embedding[...],
            arrays["targets"],
            weights,
            config.chunk_size,
            config.vocab_chunk,
            decoder.config.final_softcap,
        )
        return loss, {"examples": (batch["weight"].sum(), jnp.float32(1))}

    def _hidden(self, model: PaliGemma, batch, keys=None):
        arrays = prompts.training_arrays(batch)
        features = self.features(model, batch, keys)
        hidden, _ = model.hidden(features, arrays["tokens"], arrays["mask_ar"], arrays["mask_input"], keys)
        return hidden, arrays

    def token_loss(self, model: PaliGemma, batch) -> tuple[jax.Array, jax.Array]:
        """Summed nll in nats and number of supervised tokens, a row each [b]; never holds [b, T, V]."""
        hidden, arrays = self._hidden(model, batch)
        config, decoder = self.config.loss, model.decoder
        scores = token_scores(
            hidden,
            decoder.embed_tokens.embedding[...],
            arrays["targets"],
            config.chunk_size,
            config.vocab_chunk,
            decoder.config.final_softcap,
        )
        return -(scores.log_probs * arrays["weights"]).sum(1), arrays["weights"].sum(1)

    # Evaluation.

    def start(self, workdir: Path) -> None:
        """Puts the tokenizer beside the checkpoints."""
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "tokenizer.model").write_bytes(self.tokenizer.model_bytes)

    def companions(self) -> dict[str, ConfigDict]:
        """The question-only control: the same fine-tuning on black images."""
        if not self.config.eval.controls or self.config.data.blank_images:
            return {}
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.data.blank_images = True
            config.eval.controls = config.eval.before = False
        return {"question_only": config}

    def validate(self, model: PaliGemma) -> dict[str, float]:
        from paligemma_jax.tasks.vqa_evaluation import Evaluation

        return Evaluation(self, model).summary(self.split("tune"), wanted=("generate", "loss"))

    def evaluate(
        self, model: PaliGemma, workdir: Path, split: str | None = None, companions: dict | None = None
    ) -> dict[str, Any]:
        from paligemma_jax.tasks.vqa_report import report

        return report(self, model, workdir, split or self.default_split, companions)
