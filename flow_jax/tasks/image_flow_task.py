"""The base class of tasks that train a flow from noise to images: models, evaluation and rows. See flow_task.py."""

import abc
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flow_jax.data.image_datasets import ImageData
from flow_jax.data.image_pairs import ImagePairs
from flow_jax.metrics.frechet import features_of
from flow_jax.models.dit import DiT, DiTConfig
from flow_jax.models.unet import UNet, UNetConfig
from flow_jax.ode import likelihood
from flow_jax.tasks import image_evaluation
from flow_jax.tasks.flow_task import FlowKeys, FlowTask, SolverKeys
from flow_jax.tasks.image_evaluation import ImageEvaluation
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.step.placement import own_copy

DEFAULT_MULTIPLIERS = (1, 2)

MODELS = {"unet": (UNet, UNetConfig), "dit": (DiT, DiTConfig)}


@dataclasses.dataclass(frozen=True)
class UNetKeys:
    """`config.model.unet`."""

    width: int = key(32, "number of channels at the highest resolution", minimum=2)
    multipliers: tuple[int, ...] = key(
        (), f"factors of the width, one for each resolution; () = {DEFAULT_MULTIPLIERS}", minimum=1
    )
    num_blocks: int = key(1, "number of residual blocks at each resolution", minimum=1)
    attention: tuple[int, ...] = key((), "side lengths of the feature maps that have attention", minimum=1)
    head_width: int = key(32, "number of channels of an attention head", minimum=1)


@dataclasses.dataclass(frozen=True)
class DiTKeys:
    """`config.model.dit`."""

    patch_size: int = key(2, "side of a patch in pixels", minimum=1)
    width: int = key(128, "number of channels of a token", minimum=4)
    depth: int = key(6, "number of blocks", minimum=1)
    num_heads: int = key(4, "number of attention heads", minimum=1)


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """`config.model`: a velocity model of images."""

    name: str = key("unet", "architecture of the velocity model", choices=MODELS)
    dropout: float = key(
        0.0, "probability with which an activation in a block is dropped in training", minimum=0, below=1
    )
    label_dropout: float = key(
        0.1,
        "share of labels that training replaces by the null label, for classifier-free guidance",
        minimum=0,
        maximum=1,
    )
    remat: bool = key(
        False, "whether the backward pass recomputes blocks, which takes less memory and a third more time"
    )
    unet: UNetKeys = section(UNetKeys)
    dit: DiTKeys = section(DiTKeys)


@dataclasses.dataclass(frozen=True)
class EvalKeys(SolverKeys):
    """`config.eval`: samples and likelihoods."""

    num_samples: int | None = key(
        None, "number of samples of the final evaluation; None = as many as there are held-out images", minimum=2
    )
    validation_samples: int = key(200, "number of samples of an evaluation during training", minimum=2)
    batch_size: int = key(1000, "number of samples drawn, and of likelihoods measured, at once", minimum=1)
    features: str = key(
        "pixels", "features of the Frechet distance: pixels, or the import path of a function (docs/flow.md)"
    )
    reference: str = key(
        "held_out", "split of the real images that samples are compared with", choices=image_evaluation.SPLITS
    )
    reference_examples: int = key(50_000, "largest number of these real images", minimum=2)
    guidance: float = key(1.0, "scale of classifier-free guidance; 1 = the model itself, 0 = without labels")
    likelihood_examples: int = key(100, "number of held-out images whose bits per dimension are measured", minimum=1)
    divergence: str = key(
        "hutchinson",
        "how the likelihood computes the divergence: hutchinson is an unbiased estimate, exact takes one product "
        "for each pixel",
        choices=likelihood.DIVERGENCES,
    )
    likelihood_samples: int = key(1, "number of draws of the dequantisation noise for each likelihood", minimum=1)
    seed: int = key(1000, "seed of the noise that samples start from", minimum=0)


@dataclasses.dataclass(frozen=True)
class ImageFlowKeys(FlowKeys):
    """The keys of every flow of images."""

    model: ModelKeys = section(ModelKeys, architecture=True)
    eval: EvalKeys = section(EvalKeys, resume_safe=True)


class ImageFlowTask(FlowTask):
    """A flow from noise to images. A subclass defines `data`, opened on first use, as planning does not need it.

    Attributes:
      size, channels: of the images.
    """

    keys = ImageFlowKeys
    validation_metrics = ("frechet",)
    size: int
    channels: int

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        if config.coupling.name == "sinkhorn":
            raise UserError(
                "coupling.name is 'sinkhorn', which pairs across classes, expected independent or exact: change it."
            )
        if config.eval.guidance != 1.0 and not config.model.label_dropout > 0:
            raise UserError(
                f"eval.guidance is {config.eval.guidance} with model.label_dropout={config.model.label_dropout}, "
                "expected guidance 1, or a share of labels to drop in training: guidance needs a model that is also "
                "trained without labels."
            )
        features_of(config.eval.features)  # reports a function that does not exist before training
        self.label_dropout = config.model.label_dropout

    @property
    @abc.abstractmethod
    def data(self) -> ImageData:
        """The images."""

    @functools.cached_property
    def evaluation(self) -> ImageEvaluation:
        """The evaluation of models on the data."""
        return ImageEvaluation(self.data, self.path, self.config.data, self.config.eval, self.mesh)

    def velocity_model(self, **condition: Any) -> UNet | DiT:
        """Returns a new model with the config's sizes; `condition` is its num_classes or vector_width."""
        make_model, _ = MODELS[self.config.model.name]
        return make_model(self.model_config(**condition), rngs=nnx.Rngs(self.config.seed))

    def model_config(self, **condition: Any) -> UNetConfig | DiTConfig:
        """Returns the sizes of `velocity_model`.

        Raises:
          UserError: the sizes do not fit each other or the images.
        """
        settings = self.config.model
        _, make_config = MODELS[settings.name]
        sizes = dict(settings[settings.name])
        if settings.name == "unet":
            sizes["multipliers"] = sizes["multipliers"] or DEFAULT_MULTIPLIERS
        dtype = self.config.compute_dtype
        sizes |= {"dropout": settings.dropout, "remat": settings.remat, **condition}
        sizes["dtype"] = None if dtype == "float32" else dtype
        try:
            return make_config(image_size=self.size, channels=self.channels, **sizes)
        except ValueError as error:
            raise UserError(f"model.{settings.name}: {error}") from None

    def train_source(self) -> ImagePairs:
        """Returns pairs of noise and training images."""
        data = self.config.data
        return ImagePairs(
            self.data,
            data.dequantize,
            self.config.coupling.name,
            self.config.seed,
            group=self.config.coupling.group,
            flip=data.flip,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction,
        )

    def reported_data(self) -> str:
        """Returns the fingerprint of the held-out split."""
        return self.data.held_out.fingerprint

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns a row of zeros with the keys, shapes and dtypes of the training source."""
        image = np.zeros((self.size, self.size, self.channels), np.float32)
        row = {"x_0": image, "x_1": image, "weight": np.zeros((), np.float32)}
        return row | {"label": np.zeros((), np.int32)} if self.num_classes else row

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the shape of the images, and their labels."""
        labels = f"labels: {batch['label'][0].tolist()}" if "label" in batch else "without labels"
        return f"{batch['x_1'][0].shape} images, {labels}"

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Returns the Frechet distance of some samples."""
        return self.evaluation.validate(own_copy(model))

    def evaluate(
        self, model: nnx.Module, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Returns the content of `eval.json` and draws figures; see ImageEvaluation.evaluate."""
        return self.evaluation.evaluate(own_copy(model), workdir)
