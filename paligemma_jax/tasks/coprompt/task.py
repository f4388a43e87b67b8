"""Few-shot tuning of a SigLIP or a CLIP on a few images of each class, by CoPrompt or a related method.

All methods are the same run: adapt/few_shot/methods.py has the parameters that a method attaches and trains,
losses/coprompt.py the loss, data/few_shot/protocols.py the images. Axes: B images, C classes of the training images, at
most S sentences about a class, T tokens, E of an embedding.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from paligemma_jax import zero_shot
from paligemma_jax.adapt.few_shot.learned_prompts import PromptedDualEncoder, check_texts
from paligemma_jax.adapt.few_shot.methods import attach_method
from paligemma_jax.data.few_shot.descriptions import fill, positions
from paligemma_jax.data.few_shot.protocols import Protocol
from paligemma_jax.data.few_shot.rows import TunedRows
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer, load_text_tokenizer
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.inference import command
from paligemma_jax.losses.coprompt import coprompt_loss
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks import common
from paligemma_jax.tasks.coprompt import config as coprompt_config
from paligemma_jax.tasks.coprompt import data as coprompt_data
from paligemma_jax.tasks.coprompt import plan as coprompt_plan
from paligemma_jax.tasks.coprompt import report as coprompt_report
from paligemma_jax.tasks.starting_weights import StartsFromWeights
from paligemma_jax.weights import reader, save_prompts
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.parallel.sharding import Spec
from train_jax.task import Blueprint

AnyArray = jax.Array | np.ndarray
ADAPTER = "adapter"  # folder of the workdir with the trained prompts and adapters
TEXTS = "class_texts"  # attribute of a model in training: its ClassTexts


class ClassTexts(NamedTuple):
    """The texts about the classes that a run is tuned on.

    In training they are frozen arrays of the model, so that a program takes them as arguments. As constants, the
    sentences of a thousand classes would be compiled into every program of the run.

    Attributes:
      tokens: of the class texts.
      mask: of the tokens; None where all of them are read.
      frozen: embeddings by the base of the sentences about each class; None where the loss does not need them.
      lengths: number of sentences of each class.
    """

    tokens: Int[AnyArray, "C T"]
    mask: Bool[AnyArray, "C T"] | None
    frozen: Float[AnyArray, "C S E"] | None
    lengths: Int[AnyArray, " C"]

    def attach_to(self, model: DualEncoder) -> DualEncoder:
        """Adds the arrays to a model, in place, and returns it."""
        arrays = {name: array for name, array in self._asdict().items() if array is not None}
        setattr(model, TEXTS, nnx.Dict({name: nnx.Param(jnp.asarray(array)) for name, array in arrays.items()}))
        return model

    @classmethod
    def of(cls, model: DualEncoder) -> "ClassTexts":
        """Returns the texts that `attach_to` added to a model."""
        params = getattr(model, TEXTS)
        mask, frozen = (params[name][...] if name in params else None for name in ("mask", "frozen"))
        return cls(params["tokens"][...], mask, frozen, params["lengths"][...])

    def frozen_sentences(self, draw: Float[Array, ""]) -> Float[Array, "C E"]:
        """Returns the embedding of the sentence of each class that a draw in [0, 1) selects."""
        chosen = positions(draw, self.lengths)
        return jnp.take_along_axis(jnp.asarray(self.frozen), chosen[:, None, None], axis=1)[:, 0]


class CoPrompt(StartsFromWeights):
    """Tunes a dual encoder on a few images of each class; see the module."""

    keys = coprompt_config.Keys
    op_classes = common.OP_CLASSES
    validation_metrics = ("val_accuracy",)
    default_split = "test"

    def __init__(self, config: ConfigDict, mesh: Mesh):
        coprompt_config.check(config)
        super().__init__(config, mesh)
        self.weight = coprompt_config.weight(config)
        base = nnx.eval_shape(lambda: reader.new(config.model.path, **self._options()))
        if not isinstance(base, DualEncoder):
            raise UserError(f"model.path is {config.model.path}, expected a SigLIP or CLIP: give one.")
        self.model_config = base.config
        self.method = coprompt_config.method(config, base.config)
        self.tokenizer: TextTokenizer = load_text_tokenizer(self._tokenizer_path(), base.config.text.length)
        self.tokenizer.fits(base.config.text.vocab_size)
        self.abstract()  # raises where prompts do not fit

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Returns the likelihood of each class for each image."""
        return command.class_lines(flags, workdir, config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the shapes of a run, for the plan command."""
        return coprompt_plan.blueprint(cls, config, mesh)

    # Model.

    def _options(self) -> dict[str, Any]:
        """Returns the options with which the base is read."""
        options = {name: self.config.model[name] for name in ("remat", "unroll", "attention")}
        return {"dtype": self.config.compute_dtype, "param_dtype": "float32"} | options

    def _tokenizer_path(self) -> str:
        return self.config.tokenizer or self.config.model.path

    def base(self) -> DualEncoder:
        """Returns the model without prompts: a new module with each call.

        It is read once, or with each call where the base itself trains, as training donates its arrays.
        """
        return nnx.clone(self._kept_base) if self.method.keeps_base else self._read_base()

    @cached_property
    def _kept_base(self) -> DualEncoder:
        return self._read_base()

    def _read_base(self) -> DualEncoder:
        model = reader.load(self.config.model.path, **self._options())
        assert isinstance(model, DualEncoder)  # as the constructor has checked
        return model

    def init(self) -> DualEncoder:
        """Returns the base with new prompts and adapters."""
        return self._attach(self.base())

    def init_for_training(self) -> DualEncoder:
        """Returns the model with the class texts, which the loss reads."""
        return self.class_texts.attach_to(self.init())

    def abstract(self, texts: ClassTexts | None = None) -> DualEncoder:
        """Returns the model with shapes in place of arrays; with class texts if some are given."""

        def make() -> DualEncoder:
            base = reader.new(self.config.model.path, **self._options())
            assert isinstance(base, DualEncoder)  # as the constructor has checked
            model = self._attach(base)
            return model if texts is None else texts.attach_to(model)

        return nnx.eval_shape(make)

    def _attach(self, base: DualEncoder) -> DualEncoder:
        text = self.config.init_words
        tokens = None if text is None else self.tokenizer.encode(text)
        return attach_method(base, self.method, init_words=tokens, rngs=nnx.Rngs(self.config.seed))

    def trainable(self) -> str | None:
        """Returns the pattern of the parameters that train; None for zero_shot."""
        pattern = self.method.trainable
        return None if pattern is None else rf"(?!{TEXTS}/)({pattern})"

    def trainable_paths(self) -> list[str]:
        """Returns the paths of the parameters that train."""
        pattern = self.trainable()
        if pattern is None:
            return []
        return patterns.select(pattern, param_tree.abstract(self.abstract()), what="trainable parameters")

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """Returns the sharding rules of a dual encoder."""
        return common.SHARDING_RULES

    def describe(self, model: DualEncoder) -> str:
        """Returns the method, its prompts and the weight of consistency, for the start-up report."""
        prompts = f": {model.prompts.config}" if isinstance(model, PromptedDualEncoder) else ""
        return f"{self.config.method}{prompts}; consistency {self.weight:g}"

    # Data.

    @cached_property
    def protocol(self) -> Protocol:
        """The images to tune on and to test on; read on first use, as the model does not depend on them."""
        return coprompt_data.read_data(self.config, self.model_config.vision.image_size)

    def _bad_rows(self) -> dict[str, Any]:
        """Returns the options for images that cannot be read."""
        return dict(on_error=self.config.data.on_error, max_bad_fraction=self.config.data.max_bad_fraction)

    def train_source(self) -> TunedRows:
        """Returns the training rows."""
        _ = self.class_texts  # first, so that faults of the texts are reported before training
        return self.train_records()

    def train_records(self) -> TunedRows:
        """Returns the training rows, without encoding the class texts."""
        views = {side: Augmentation(**values) for side, values in self.config.views.items()}
        rows = dict(preprocessing=self.model_config.preprocessing, seed=self.config.seed)
        return TunedRows(self.protocol.tuned, **rows, **views, **self._bad_rows())

    def reported_data(self) -> str:
        """Returns the fingerprint of the test images."""
        return coprompt_data.tested_fingerprint(self.protocol, self.config.data.cache_dir)

    @cached_property
    def class_texts(self) -> ClassTexts:
        """The class texts and, where the loss needs them, the frozen embeddings of sentences about the classes."""
        classes = self.protocol.tuned.classes
        tokens, mask = self.tokenizer([fill(self.config.template, name) for name in classes])
        check_texts(self.abstract(), tokens)
        frozen, lengths = None, np.ones(len(classes), np.int32)
        if self.weight and self.config.consistency.on != "image":
            sentences = coprompt_data.read_sentences(self.config, classes)
            frozen, lengths = embed_sentences(self.base(), self.tokenizer, sentences)
        return ClassTexts(tokens, None if mask.all() else mask, frozen, lengths)

    def blank_texts(self, classes: int, sentences: int) -> ClassTexts:
        """Returns texts of zeros with the shapes of a run, for a plan.

        Args:
          classes: number of classes.
          sentences: number of sentences about a class; 0 where the loss does not need them.
        """
        tokens = np.zeros((classes, self.model_config.text.length), np.int32)
        mask = None if self.tokenizer.bos_id is None else np.ones(tokens.shape, bool)
        frozen = np.zeros((classes, sentences, self.model_config.embed_dim), np.float32) if sentences else None
        return ClassTexts(tokens, mask, frozen, np.full(classes, max(sentences, 1), np.int32))

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the class of each image of a batch."""
        return "\n".join(self.protocol.tuned.classes[label] for label in batch["label"].ravel())

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        """Returns the number of valid images."""
        return jnp.maximum(batch["weight"].sum(), 1.0)

    def loss(self, model: DualEncoder, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the loss times the number of valid images; the runtime normalizes."""
        settings, texts = self.config.consistency, ClassTexts.of(model)
        images = common.normalize(model, batch["image"])
        rows = {"images": images, "labels": batch["label"], "weights": batch["weight"]}
        rows["tokens"] = jnp.asarray(texts.tokens)
        if texts.mask is not None:
            rows["text_mask"] = jnp.asarray(texts.mask)
        if texts.frozen is not None:
            rows["frozen_text"] = texts.frozen_sentences(batch["draw"][0])
        if self.weight and settings.on != "text":
            rows["images_augmented"] = common.normalize(model, batch["image_augmented"]) if settings.perturb else images
        loss, parts = coprompt_loss(model, rows, self.weight, settings.kind, settings.on)
        count = batch["weight"].sum()
        right = (parts["logits"].argmax(-1) == batch["label"]) * batch["weight"]
        metrics = {name: (parts[name] * count, count) for name in ("ce", "text", "image") if name in parts}
        return loss * count, metrics | {"accuracy": (right.sum(), count)}

    # Evaluation.

    def starting_weights(self) -> dict[str, str | None]:
        """Returns the path of the base."""
        return {"path": self.config.model.path}

    def start(self, workdir: Path) -> None:
        """Writes the protocol, the tokenizer, and a digest of the base to the workdir.

        Raises:
          UserError: the run in this workdir has other images.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        coprompt_data.store(self.protocol, workdir)
        super().start(workdir)
        copy_text_tokenizer(self._tokenizer_path(), workdir, self.model_config.text.length)

    def export(self, model: DualEncoder, workdir: Path) -> None:
        """Writes prompts and adapters without the base, for `pg.load(base, adapter=...)`."""
        if isinstance(model, PromptedDualEncoder) and jax.process_index() == 0:
            save_prompts(model, workdir / ADAPTER)

    def validate(self, model: DualEncoder) -> dict[str, float]:
        """Returns the accuracy on the validation images of the training classes; nothing if there are none."""
        tuned = self.protocol.tuned
        if not tuned.splits["val"]:
            return {}
        scores = coprompt_report.score(model, self.tokenizer, self.config.template, tuned, "val", **self._bad_rows())
        return {"val_accuracy": scores.accuracy}

    def evaluate(
        self, model: DualEncoder, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Evaluates a model on the test sets, see `coprompt_report.report`.

        Raises:
          UserError: another split than "test", or test images that the workdir's run was tuned on.
        """
        if split not in (None, self.default_split):
            raise UserError(
                f"split is {split!r}, expected {self.default_split!r}, of which results are: leave --split out."
            )
        if self.trainable() is not None:
            coprompt_data.check_unseen(self.protocol, workdir)
        return coprompt_report.report(
            model, self.tokenizer, self.config.template, self.protocol, workdir, **self._bad_rows()
        )


def embed_sentences(
    base: DualEncoder, tokenizer: TextTokenizer, sentences: tuple[tuple[str, ...], ...]
) -> tuple[Float[np.ndarray, "C S E"], Int[np.ndarray, " C"]]:
    """Returns the embeddings of the sentences about each class, padded with zeros, and the number of sentences."""
    lengths = np.array([len(group) for group in sentences], np.int32)
    embedded = zero_shot.embed_texts(base, tokenizer, [sentence for group in sentences for sentence in group])
    table = np.zeros((len(sentences), lengths.max(), embedded.shape[1]), np.float32)
    table[np.arange(lengths.max())[None] < lengths[:, None]] = embedded
    return table, lengths
