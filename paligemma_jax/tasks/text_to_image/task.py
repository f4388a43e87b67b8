"""Small-scale text to image: a flow from noise to images of single objects, conditioned on their descriptions.

The condition is an object's attributes, or the embedding of a caption by a SigLIP's text tower. The same SigLIP
measures whether samples show what was described. This is the only package of paligemma_jax that imports flow_jax.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int, Num, UInt8
from ml_collections import ConfigDict

from flow_jax.data.image_datasets import BYTES, ImageData, PixelKeys
from flow_jax.data.image_pairs import to_levels
from flow_jax.data.image_sets import LabeledImage
from flow_jax.ode import sampling
from flow_jax.ode.guidance import Guided
from flow_jax.tasks.flow_task import solver_arguments
from flow_jax.tasks.image_flow_task import ImageFlowKeys, ImageFlowTask
from flow_jax.tasks.image_sampler import noise
from paligemma_jax import zero_shot
from paligemma_jax.data.sources.captioned import CaptionedScenes
from paligemma_jax.data.synthetic_clevr import captions, conditioning
from paligemma_jax.data.synthetic_clevr.conditioning import Descriptions
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer, load_text_tokenizer
from paligemma_jax.loading import load, load_run
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks.image_sheet import save_image_sheet
from paligemma_jax.tasks.rendered import CaptionKeys, rendered
from paligemma_jax.tasks.starting_weights import StartsFromWeights
from paligemma_jax.tasks.text_to_image.siglip_scorer import SigLIPScorer
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError, quoted
from train_jax.parallel import sharding
from train_jax.step.placement import own_copy

CONDITIONINGS = ("attributes", "captions")
SHOWN = 24  # images on the sheet captions.png


class ConditionTable(nnx.Module):
    """A velocity model whose labels are row numbers of a table of conditions; the last row is the null condition."""

    def __init__(self, model: nnx.Module, table: Num[np.ndarray, "N K"]):
        self.model = model
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, t, x: Float[jax.Array, "B I I 3"], labels: Int[jax.Array, " B"], dropout_keys=None):
        """Returns the velocity of the model for the conditions of the labels."""
        return self.model(t, x, self.table[...][labels], dropout_keys)


class SceneImages:
    """Images of single objects labelled with the numbers of their descriptions: a flow_jax.data.image_sets.ImageSet."""

    def __init__(self, scenes: CaptionedScenes, conditioning: str, descriptions: Descriptions):
        self._scenes, self._conditioning, self._descriptions = scenes, conditioning, descriptions
        self.fingerprint = f"{scenes.folder.name}-{conditioning}-{len(scenes)}"

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> LabeledImage:
        return LabeledImage(self._scenes.image(index), self.label(index))

    def label(self, index: int) -> int:
        """Returns the number of an image's description."""
        return self._descriptions.numbers[self.text(index)]

    def text(self, index: int) -> str:
        """Returns the description of an image."""
        if self._conditioning == "captions":
            return self._scenes.text(index)
        return conditioning.text_of(self._scenes.scenes[self._scenes.image_number(index)]["objects"][0])

    def name(self, index: int) -> str:
        """Returns a name for messages."""
        return f"scene {self._scenes.image_number(index)}"


@dataclasses.dataclass(frozen=True)
class CaptionedSceneKeys(PixelKeys, CaptionKeys):
    """`config.data`: synthetic scenes. Scenes that `flip` mirrors are lit from the other side."""

    num_scenes: int = key(8000, "number of scenes to train on", minimum=2)
    num_held_out: int = key(400, "number of scenes to evaluate on", minimum=2)
    image_size: int = key(32, "side of an image in pixels", minimum=1)


@dataclasses.dataclass(frozen=True)
class Keys(ImageFlowKeys):
    """The keys of the task."""

    conditioning: str = key(
        "attributes", "what the model is given about each image", choices=CONDITIONINGS, architecture=True
    )
    siglip: str | None = key(
        None,
        "folder, run or name of the SigLIP or CLIP that encodes captions and scores samples; None = samples are not "
        "scored",
        architecture=True,
    )
    data: CaptionedSceneKeys = section(CaptionedSceneKeys)


class TextToImage(StartsFromWeights, ImageFlowTask):
    """A flow from noise to images of single objects, conditioned on their descriptions."""

    keys = Keys

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        if config.conditioning == "captions" and config.siglip is None:
            raise UserError(
                "conditioning is 'captions' but siglip is not set, expected a SigLIP whose text tower reads them: add "
                "--config.siglip=tiny-siglip, or set conditioning='attributes'."
            )
        if config.coupling.name != "independent":
            raise UserError(
                f"coupling.name is {config.coupling.name!r}, which assigns each description a part of the noise, "
                "expected independent: change it."
            )
        self.size, self.channels = config.data.image_size, 3
        self.model_config()  # checks sizes before scenes are rendered

    # Conditions.

    @functools.cached_property
    def siglip(self) -> tuple[DualEncoder, TextTokenizer] | None:
        """The SigLIP and its tokenizer; None if the config has none."""
        path = self.config.siglip
        if path is None:
            return None
        model = load(path)
        if not isinstance(model, DualEncoder):
            raise UserError(f"siglip is {path}, which is not a SigLIP or CLIP, expected one of these: set another.")
        tokenizer = load_text_tokenizer(path, model.config.text.length)
        tokenizer.fits(model.config.text.vocab_size)
        return model, tokenizer

    @functools.cached_property
    def descriptions(self) -> Descriptions:
        """All descriptions on which the model may be conditioned."""
        if self.config.conditioning == "attributes":
            return conditioning.of_attributes()
        return conditioning.of_captions(captions.of_single_objects(), self.vectors)

    def vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Returns unit-length embeddings of texts by the SigLIP's text tower."""
        assert self.siglip is not None  # __init__ requires one for captions
        with jax.ensure_compile_time_eval():  # the plan command traces `init` for its shapes
            return zero_shot.class_embeddings(*self.siglip, texts)

    # Model.

    def init(self) -> ConditionTable:
        """Returns the velocity model at the start of training, with the table of conditions."""
        table = self.descriptions.table
        if self.config.conditioning == "attributes":
            return ConditionTable(self.velocity_model(num_classes=conditioning.SIZES), table)
        return ConditionTable(self.velocity_model(vector_width=table.shape[1]), table)

    def trainable(self) -> str:
        """Returns a pattern for all parameters but the table of conditions."""
        return r"model/.*"

    @property
    def num_classes(self) -> int:
        """The number of descriptions, which is also the label of the null condition."""
        return len(self.descriptions.texts)

    # Data and evaluation.

    @functools.cached_property
    def data(self) -> ImageData:
        """Rendered scenes of one object."""
        train, held_out = (
            self._scene_images(stream, number, views)
            for stream, number, views in (
                ("drawing", self.config.data.num_scenes, self.config.data.views),
                ("drawing-held-out", self.config.data.num_held_out, 1),
            )
        )
        shape = self.size, self.channels, BYTES
        return ImageData(train, held_out, *shape, self.num_classes, self._scores, row_per_label=False)

    def _scene_images(self, stream: str, number: int, views: int) -> SceneImages:
        folder = rendered(self.config.data, stream, number, self.size, 1, (1, 1))
        tokenizer = load_text_tokenizer("tiny")  # required, but not used: labels are numbers of texts
        return SceneImages(CaptionedScenes(folder, tokenizer, views), self.config.conditioning, self.descriptions)

    def _scores(self) -> list[SigLIPScorer]:
        if self.siglip is None:
            return []
        held_out = self.data.held_out
        images = [held_out[index] for index in range(len(held_out))]
        real = np.stack([image.pixels for image in images]), np.array([image.label for image in images])
        return [SigLIPScorer(*self.siglip, self.descriptions.attributes, real)]

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Samples an image for each prompt, saves them on one sheet, and returns a line that names the file."""
        for name in ("image", "class"):
            if flags[name]:
                raise UserError(
                    f"--{name}={flags[name][0]} is given to a text-to-image run, expected prompts alone: leave it out."
                )
        texts = flags["prompt"]
        if not texts:
            raise UserError("there is no prompt, expected one for each image to draw: add --prompt.")
        model = cast(ConditionTable, load_run(workdir, config, flags["checkpoint"]))  # as `init` returns it
        images = cls(config, sharding.make_mesh(config.mesh)).draw(model, texts, flags["seed"])
        file = Path(flags["out"] or f"{workdir}/drawn.png")
        save_image_sheet(list(images), texts, file)
        return [f"{len(images)} image(s) in {file}"]

    def draw(self, model: ConditionTable, texts: Sequence[str], seed: int) -> UInt8[np.ndarray, "N I I 3"]:
        """Samples an image for each text, with the solver and guidance of the config's `eval`.

        Raises:
          UserError: the model is conditioned on attributes, and a text does not name all of them.
        """
        conditions, null = self._conditions(texts)
        options = self.config.eval
        velocity = model.model if options.guidance == 1.0 else Guided(model.model, options.guidance, null)
        x_0 = self.path.start(noise(seed, jnp.arange(len(texts)), (self.size, self.size, self.channels)))
        result = sampling.sample(velocity, x_0, **solver_arguments(options), args=(jnp.asarray(conditions),))
        return to_levels(np.asarray(result.x), BYTES, self.config.data.dequantize)

    def _conditions(self, texts: Sequence[str]) -> tuple[np.ndarray, float | tuple[int, ...]]:
        """Returns the conditions of texts, and the null condition."""
        if self.config.conditioning == "captions":
            return self.vectors(texts), 0.0
        numbers = []
        for text in texts:
            attributes = conditioning.named_attributes(text)
            missing = [name for name in conditioning.ATTRIBUTES if name not in attributes]
            if missing:
                raise UserError(
                    f"{quoted(text)} names no {' and no '.join(missing)}, expected all attributes, such as 'small red "
                    "metal cube': the run was not trained on captions; add them."
                )
            numbers.append(self.descriptions.numbers[conditioning.text_of(attributes)])
        return self.descriptions.table[numbers], conditioning.SIZES

    def describe(self, model: ConditionTable) -> str:
        """Returns a line about the SigLIP that measures the samples."""
        if self.siglip is None:
            return "samples are not measured by a SigLIP: set one by --config.siglip=PATH"
        return f"samples are measured by {self.config.siglip}"

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the descriptions of a batch, one per line."""
        return "\n".join(self.descriptions.texts[int(label)] for label in batch["label"][0])

    def starting_weights(self) -> dict[str, str | None]:
        """Returns the path of the SigLIP that embeds the captions; None for attributes."""
        return {"siglip": self.config.siglip if self.config.conditioning == "captions" else None}

    def evaluate(
        self, model: nnx.Module, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Evaluates as every image flow does, and saves samples with their descriptions in captions.png."""
        model = own_copy(model)
        results = super().evaluate(model, workdir)
        held_out = self.data.held_out
        rows = np.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).astype(int).tolist()
        labels = np.array([held_out.label(row) for row in rows], np.int32)
        samples = [image for batch in self.evaluation.sampler(model).batches(labels) for image in batch.images]
        real = [held_out[row].pixels for row in rows]
        texts = [self.descriptions.texts[int(label)] for label in labels]
        save_image_sheet(samples, texts, workdir / "captions.png", real)
        return results
