"""Tunes a SigLIP or a CLIP on a few images of each class, by CoPrompt or one of its relatives: the runtime's Task.

Every method is the same run: what it attaches and trains is in adapt/few_shot/methods.py, the loss in
losses/coprompt.py, the images in data/few_shot/protocols.py. Axes: B images, C classes that are tuned on, S sentences
about a class at most, T tokens, E of an embedding.
"""

from collections.abc import Iterable, Mapping
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
from paligemma_jax.adapt.few_shot.methods import attach_method
from paligemma_jax.adapt.few_shot.prompts import check_texts
from paligemma_jax.data.few_shot.descriptions import fill, place
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
from paligemma_jax.weights import reader as load
from paligemma_jax.weights import save_prompts
from paligemma_jax.weights.fingerprint import check_digest, write_digest
from paligemma_jax.weights.tokenizer_files import copy_text_tokenizer
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.task import Blueprint, Task

AnyArray = jax.Array | np.ndarray
ADAPTER = "adapter"  # folder of the workdir with what was trained beside the base
TEXTS = "class_texts"  # attribute of a model that trains: its Texts


class Texts(NamedTuple):
    """What a run says of the classes that it is tuned on.

    In training they lie beside the parameters as frozen arrays, so that a program is given them; as constants in it,
    the sentences of a thousand classes would be compiled into every program of the run.

    Attributes:
      tokens, mask: of the class texts; no mask where all of it is read.
      frozen: embeddings by the base of the sentences about each class, whose number is in `lengths`; None where the
        loss does not ask for them.
    """

    tokens: Int[AnyArray, "C T"]
    mask: Bool[AnyArray, "C T"] | None
    frozen: Float[AnyArray, "C S E"] | None
    lengths: Int[AnyArray, " C"]

    def beside(self, model: DualEncoder) -> DualEncoder:
        """Puts them into a model, in place."""
        held = {name: array for name, array in self._asdict().items() if array is not None}
        setattr(model, TEXTS, nnx.Dict({name: nnx.Param(jnp.asarray(array)) for name, array in held.items()}))
        return model

    @classmethod
    def of(cls, model: DualEncoder) -> "Texts":
        """Those that `beside` put into a model."""
        held = getattr(model, TEXTS)
        return cls(**{name: held[name][...] if name in held else None for name in cls._fields})

    def of_draw(self, draw: Float[Array, ""]) -> Float[Array, "C E"]:
        """The sentence of each class that a draw chooses."""
        places = place(draw, self.lengths)
        return jnp.take_along_axis(jnp.asarray(self.frozen), places[:, None, None], axis=1)[:, 0]


class CoPrompt(Task):
    """The task; see the module."""

    keys = coprompt_config.Keys
    validation_metrics = ("val_accuracy",)
    default_split = "test"

    def __init__(self, config: ConfigDict, mesh: Mesh):
        coprompt_config.check(config)
        self.config, self.mesh = config, mesh
        self.weight = coprompt_config.weight(config)
        base = nnx.eval_shape(lambda: load.new(config.model.path, **self._options()))
        if not isinstance(base, DualEncoder):
            raise UserError(f"model.path is {config.model.path}, which is no SigLIP or CLIP: give another.")
        self.model_config = base.config
        self.method = coprompt_config.method(config, base.config)
        self.tokenizer: TextTokenizer = load_text_tokenizer(self._tokenizer_path(), base.config.text.length)
        self.tokenizer.fits(base.config.text.vocab_size)
        self.texts: Texts | None = None  # once there are training data
        self.abstract()  # which tells prompts that do not fit
        self._base: DualEncoder | None = None  # between these and `init`

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """The likelihood of each class for each image."""
        return command.class_lines(flags, workdir, config)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Shapes of a run, for the plan command."""
        return coprompt_plan.blueprint(cls, config, mesh)

    # Model.

    def _options(self) -> dict[str, Any]:
        config = self.config
        model = {"remat": config.model.remat, "unroll": config.model.unroll}
        return {"dtype": config.compute_dtype, "param_dtype": "float32"} | model

    def _tokenizer_path(self) -> str:
        return self.config.tokenizer or self.config.model.path

    def init(self) -> DualEncoder:
        model, self._base = self._base or self._read(), None
        return self._attached(model)

    def abstract(self) -> DualEncoder:
        """The model in shapes."""
        return nnx.eval_shape(lambda: self._attached(load.new(self.config.model.path, **self._options())))

    def _read(self) -> DualEncoder:
        return load.load(self.config.model.path, **self._options())

    def _attached(self, base: DualEncoder) -> DualEncoder:
        words = self.config.init_words
        ids = None if words is None else self.tokenizer.encode(words)
        model = attach_method(base, self.method, init_words=ids, rngs=nnx.Rngs(self.config.seed))
        return model if self.texts is None else self.texts.beside(model)

    def trainable(self) -> str | None:
        pattern = self.method.trainable
        return None if pattern is None else rf"(?!{TEXTS}/)({pattern})"

    def trainable_paths(self) -> list[str]:
        """Paths of the parameters that train."""
        return patterns.select(self.trainable(), param_tree.abstract(self.abstract()), what="trainable parameters")

    def sharding_rules(self):
        return common.SHARDING_RULES

    def describe(self, model: DualEncoder) -> str:
        learned = "" if model.prompts is None else f": {model.prompts.config}"
        return f"{self.config.method}{learned}; consistency {self.weight:g}"

    # Data.

    @cached_property
    def protocol(self) -> Protocol:
        """What is tuned on and tested on; read on first use, for a run's model is made without it."""
        return coprompt_data.read_data(self.config, self.model_config.vision.image_size)

    def _bad(self) -> dict[str, Any]:
        return dict(on_error=self.config.data.on_error, max_bad_fraction=self.config.data.max_bad_fraction)

    def train_source(self) -> TunedRows:
        self._base = self._read()
        self.texts = self.encode_texts(self._base)
        return self.train_records()

    def train_records(self) -> TunedRows:
        """What `train_source` returns, without the texts that it encodes for the loss."""
        views = {side: Augmentation(**values) for side, values in self.config.views.items()}
        rows = dict(preprocessing=self.model_config.preprocessing, seed=self.config.seed)
        return TunedRows(self.protocol.tuned, **rows, **views, **self._bad())

    def reported_data(self) -> str:
        """Fingerprint of what a run is tested on."""
        return coprompt_data.tested_fingerprint(self.protocol, self.config.data.cache_dir)

    def encode_texts(self, base: DualEncoder) -> Texts:
        """The class texts, and where the loss asks for them the frozen embeddings of what is said of the classes."""
        classes = self.protocol.tuned.classes
        tokens, mask = self.tokenizer([fill(self.config.template, name) for name in classes])
        check_texts(self.abstract(), tokens)
        frozen, lengths = None, np.ones(len(classes), np.int32)
        if self.weight and self.config.consistency.on != "image":
            sentences = coprompt_data.read_sentences(self.config, classes)
            frozen, lengths = embed_sentences(base, self.tokenizer, sentences)
        return Texts(tokens, None if mask.all() else mask, frozen, lengths)

    def assume_texts(self, classes: int, sentences: int, length: int) -> None:
        """Texts of so many classes without their words, for a plan; 0 sentences: the loss asks for none."""
        tokens, lengths = np.zeros((classes, length), np.int32), np.full(classes, max(sentences, 1), np.int32)
        mask = None if self.tokenizer.bos_id is None else np.ones(tokens.shape, bool)
        frozen = np.zeros((classes, sentences, self.model_config.embed_dim), np.float32) if sentences else None
        self.texts = Texts(tokens, mask, frozen, lengths)

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        return "\n".join(self.protocol.tuned.classes[label] for label in batch["label"].ravel())

    # Loss.

    def normalizer(self, batch) -> jax.Array:
        """The images that count."""
        return jnp.maximum(batch["weight"].sum(), 1.0)

    def loss(self, model: DualEncoder, batch, keys) -> tuple[jax.Array, Metrics]:
        """Times the images that count, by which the runtime divides; the loss of the texts is in every image's."""
        settings, normalize, texts = self.config.consistency, model.config.preprocessing.normalize, Texts.of(model)
        rows = {"images": normalize(batch["image"]), "labels": batch["label"], "weights": batch["weight"]}
        rows |= {"tokens": texts.tokens}
        if texts.mask is not None:
            rows["text_mask"] = texts.mask
        if texts.frozen is not None:
            rows["frozen_text"] = texts.of_draw(batch["draw"][0])
        if self.weight and settings.on != "text":
            rows["images_augmented"] = normalize(batch["image_augmented"]) if settings.perturb else rows["images"]
        loss, parts = coprompt_loss(model, rows, self.weight, settings.kind, settings.on)
        count = batch["weight"].sum()
        right = (parts["logits"].argmax(-1) == batch["label"]) * batch["weight"]
        metrics = {name: (parts[name] * count, count) for name in ("ce", "text", "image") if name in parts}
        return loss * count, metrics | {"accuracy": (right.sum(), count)}

    # Evaluation.

    def check_workdir(self, workdir: Path) -> None:
        """Compares the base with that which the workdir notes.

        Raises:
          UserError: the workdir's run was made on another.
        """
        check_digest(workdir, self.config.model.path)

    def start(self, workdir: Path) -> None:
        """Stores what the run is measured on, its tokenizer, and a digest of its base.

        Raises:
          UserError: the run that goes on in this workdir has other images.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        coprompt_data.store(self.protocol, workdir)
        write_digest(workdir, self.config.model.path)
        copy_text_tokenizer(self._tokenizer_path(), workdir, self.model_config.text.length)

    def export(self, model: DualEncoder, workdir: Path) -> None:
        """Writes prompts and adapters apart from their base, for `pg.load(base, adapter=...)`."""
        if model.prompts is not None and jax.process_index() == 0:
            save_prompts(model, workdir / ADAPTER)

    def validate(self, model: DualEncoder) -> dict[str, float]:
        """Accuracy on the validation images of the classes that are tuned on, where there are any."""
        tuned = self.protocol.tuned
        if not tuned.splits["val"]:
            return {}
        found = coprompt_report.score(model, self.tokenizer, self.config.template, tuned, "val", **self._bad())
        return {"val_accuracy": found.accuracy}

    def evaluate(
        self, model: DualEncoder, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """See `coprompt_report.report`.

        Raises:
          UserError: another split than "test", or test images that the workdir's run was tuned on.
        """
        if split not in (None, self.default_split):
            raise UserError(
                f"split is {split!r}, expected {self.default_split!r}, of which results are: leave --split out."
            )
        if self.trainable() is not None:
            coprompt_data.check_unseen(self.protocol, workdir)
        options = (self.tokenizer, self.config.template, self.protocol, workdir)
        return coprompt_report.report(model, *options, **self._bad())


def embed_sentences(
    base: DualEncoder, tokenizer: TextTokenizer, sentences: tuple[tuple[str, ...], ...]
) -> tuple[Float[np.ndarray, "C S E"], Int[np.ndarray, " C"]]:
    """Embeddings of the sentences about each class, zeros behind a shorter list's, and the lengths of the lists."""
    lengths = np.array([len(group) for group in sentences], np.int32)
    embedded = zero_shot.embed_texts(base, tokenizer, [sentence for group in sentences for sentence in group])
    table = np.zeros((len(sentences), lengths.max(), embedded.shape[1]), np.float32)
    table[np.arange(lengths.max())[None] < lengths[:, None]] = embedded
    return table, lengths
