"""Text to image in miniature: a flow from noise to pictures of single objects, which is told what to draw.

It is told their attributes, or a caption as the vector that a SigLIP's text tower makes of it; and that SigLIP judges
whether the samples show what was asked for. The one place where paligemma_jax meets flow_jax.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int, Num, UInt8
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax.data.image_datasets import BYTES, ImageData
from flow_jax.data.image_pairs import to_levels
from flow_jax.data.image_sets import Picture
from flow_jax.ode import sampling
from flow_jax.ode.guidance import Guided
from flow_jax.tasks.flow_task import solver
from flow_jax.tasks.image_flow_task import ImageFlowTask
from flow_jax.tasks.image_sampler import noise
from paligemma_jax import zero_shot
from paligemma_jax.data.sources.captioned import CaptionedScenes
from paligemma_jax.data.synthetic_clevr import captions, descriptions
from paligemma_jax.data.synthetic_clevr.descriptions import Descriptions
from paligemma_jax.data.tokenizers.text_tower import TextTokenizer, load_text_tokenizer
from paligemma_jax.loading import load, load_run
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks.picture_sheet import save_sheet
from paligemma_jax.tasks.rendered import rendered
from paligemma_jax.tasks.text_to_image.siglip_scorer import SigLIPScorer
from paligemma_jax.weights.fingerprint import check_digest, write_digest
from train_jax.config.base import check_choices
from train_jax.core.errors import UserError, quoted
from train_jax.core.files import cache_dir
from train_jax.parallel import sharding
from train_jax.step.placement import own_copy

CONDITIONINGS = ("attributes", "captions")
SHOWN = 24  # pictures of the sheet with their texts


class ConditionTable(nnx.Module):
    """A velocity model that is told things by their number: row n of `table`, of which the last stands for none."""

    def __init__(self, model: nnx.Module, table: Num[np.ndarray, "N K"]):
        self.model = model
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, t, x: Float[jax.Array, "B I I 3"], labels: Int[jax.Array, " B"], dropout_keys=None):
        return self.model(t, x, self.table[...][labels], dropout_keys)


class ScenePictures:
    """Pictures of single objects with the numbers of their descriptions, see flow_jax.data.image_sets.Pictures."""

    def __init__(self, scenes: CaptionedScenes, told: str, described: Descriptions):
        self._scenes, self._told, self._described = scenes, told, described
        self.fingerprint = f"{scenes.folder.name}-{told}-{len(scenes)}"

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Picture:
        return Picture(self._scenes.image(index), self.label(index))

    def label(self, index: int) -> int:
        return self._described.numbers[self.text(index)]

    def text(self, index: int) -> str:
        """What a picture is described by."""
        if self._told == "captions":
            return self._scenes.text(index)
        return descriptions.text_of(self._scenes.scenes[self._scenes.number(index)]["objects"][0])

    def name(self, index: int) -> str:
        return f"scene {self._scenes.number(index)}"


class TextToImage(ImageFlowTask):
    """The task; see the module."""

    resume_safe_keys = (*ImageFlowTask.resume_safe_keys, r"data\.(build_workers|cache_dir)")
    architecture_keys = (*ImageFlowTask.architecture_keys, r"siglip|conditioning")

    @staticmethod
    def defaults() -> ConfigDict:
        config = ImageFlowTask.defaults()
        config.conditioning = "attributes"  # attributes | captions: what the model is told of each picture
        config.siglip = placeholder(str)  # folder, run or name of a SigLIP or CLIP: reads captions, and judges samples
        config.data = ConfigDict(
            {
                "cache_dir": cache_dir(),
                "build_workers": 2,
                "num_scenes": 8000,
                "num_held_out": 400,
                "image_size": 32,
                "views": 100,  # captions of a scene before they repeat
                "flip": False,  # mirrored scenes are lit from the other side
                "dequantize": True,  # uniform noise of one grey value, without which there is no likelihood
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        check_choices(config, {"conditioning": CONDITIONINGS})
        if config.conditioning == "captions" and config.siglip is None:
            raise UserError(
                "conditioning is 'captions' but siglip is not set, expected a SigLIP whose text tower reads them: add "
                "--config.siglip=tiny-siglip, or set conditioning='attributes'."
            )
        if config.coupling.name != "independent":
            raise UserError(
                f"coupling.name is {config.coupling.name!r}, which ties descriptions to parts of the noise, expected "
                "independent: change it."
            )
        self.size, self.channels = config.data.image_size, 3

    # What is told.

    @functools.cached_property
    def siglip(self) -> tuple[DualEncoder, TextTokenizer] | None:
        """The model and its words; None where none is given."""
        path = self.config.siglip
        if path is None:
            return None
        model = load(path)
        if not isinstance(model, DualEncoder):
            raise UserError(f"siglip is {path}, which is no SigLIP or CLIP: give another.")
        words = load_text_tokenizer(path, model.config.text.length)
        words.fits(model.config.text.vocab_size)
        return model, words

    @functools.cached_property
    def descriptions(self) -> Descriptions:
        """All that the model may be told."""
        if self.config.conditioning == "attributes":
            return descriptions.of_attributes()
        return descriptions.of_captions(captions.of_single_objects(), self.vectors)

    def vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Texts as the SigLIP's text tower has them, of unit length."""
        with jax.ensure_compile_time_eval():  # the plan command asks for the model's shapes alone
            return zero_shot.class_embeddings(*self.siglip, texts)

    # Model.

    def init(self) -> ConditionTable:
        table = self.descriptions.table
        if self.config.conditioning == "attributes":
            return ConditionTable(self.velocity_model(num_classes=descriptions.SIZES), table)
        return ConditionTable(self.velocity_model(vector_width=table.shape[1]), table)

    def trainable(self) -> str:
        return r"model/.*"

    @property
    def num_classes(self) -> int:
        """Descriptions; the one behind them stands for none."""
        return len(self.descriptions.texts)

    # Data and evaluation.

    @functools.cached_property
    def data(self) -> ImageData:
        """Scenes of one object."""
        train, held_out = (
            self._pictures(stream, number, views)
            for stream, number, views in (
                ("drawing", self.config.data.num_scenes, self.config.data.views),
                ("drawing-held-out", self.config.data.num_held_out, 1),
            )
        )
        shape = self.size, self.channels, BYTES
        return ImageData(train, held_out, *shape, self.num_classes, self._scores, row_a_label=False)

    def _pictures(self, stream: str, number: int, views: int) -> ScenePictures:
        folder = rendered(self.config.data, stream, number, self.size, 1, (1, 1))
        words = load_text_tokenizer("tiny")  # rows have their texts' numbers, not their tokens
        return ScenePictures(CaptionedScenes(folder, words, views), self.config.conditioning, self.descriptions)

    def _scores(self) -> list[SigLIPScorer]:
        if self.siglip is None:
            return []
        held_out = self.data.held_out
        pictures = [held_out[index] for index in range(len(held_out))]
        real = np.stack([picture.pixels for picture in pictures]), np.array([picture.label for picture in pictures])
        return [SigLIPScorer(*self.siglip, self.descriptions.said, real)]

    @classmethod
    def predict(cls, config: ConfigDict, workdir: str, flags: Mapping[str, Any]) -> Iterable[str]:
        """Draws the prompts, by noise of `seed`, on one sheet, and tells where that is."""
        for name in ("image", "class"):
            if flags[name]:
                raise UserError(
                    f"--{name}={flags[name][0]} is given to a run that draws, expected prompts alone: leave it out."
                )
        texts = flags["prompt"]
        if not texts:
            raise UserError("no text is given to draw: add --prompt.")
        model = load_run(workdir, config, flags["checkpoint"])
        images = cls(config, sharding.make_mesh(config.mesh)).draw(model, texts, flags["seed"])
        file = Path(flags["out"] or f"{workdir}/drawn.png")
        save_sheet(list(images), texts, file)
        return [f"{len(images)} picture(s) in {file}"]

    def draw(self, model: ConditionTable, texts: Sequence[str], seed: int) -> UInt8[np.ndarray, "N I I 3"]:
        """A picture of each text, by the solver and the guidance of the config's `eval`.

        Raises:
          UserError: a text that does not name all attributes, where these are what the model is told.
        """
        told, none = self._conditions(texts)
        options = self.config.eval
        velocity = model.model if options.guidance == 1.0 else Guided(model.model, options.guidance, none)
        x_0 = self.path.start(noise(seed, jnp.arange(len(texts)), (self.size, self.size, self.channels)))
        found = sampling.sample(velocity, x_0, **solver(options), args=(jnp.asarray(told),))
        return to_levels(np.asarray(found.x), BYTES, self.config.data.dequantize)

    def _conditions(self, texts: Sequence[str]) -> tuple[np.ndarray, float | tuple[int, ...]]:
        """What the model is told of each text, and what stands for none."""
        if self.config.conditioning == "captions":
            return self.vectors(texts), 0.0
        numbers = []
        for text in texts:
            named = descriptions.said(text)
            missing = [name for name in descriptions.ATTRIBUTES if name not in named]
            if missing:
                raise UserError(
                    f"{quoted(text)} names no {' and no '.join(missing)}, expected all attributes, such as 'small red "
                    "metal cube': the run was not trained on captions; add them."
                )
            numbers.append(self.descriptions.numbers[descriptions.text_of(named)])
        return self.descriptions.table[numbers], descriptions.SIZES

    def describe(self, model: ConditionTable) -> str:
        if self.siglip is None:
            return "no SigLIP judges the samples: --config.siglip=PATH names one"
        return f"samples are judged by {self.config.siglip}"

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        return "\n".join(self.descriptions.texts[label] for label in batch["label"][0])

    def check_workdir(self, workdir: Path) -> None:
        """Compares the SigLIP that reads the captions with that which the workdir notes.

        Raises:
          UserError: the workdir's run was trained on the texts of another.
        """
        check_digest(workdir, None, siglip=self._reader())

    def _reader(self) -> str | None:
        """Path of the SigLIP whose text tower reads the captions."""
        return self.config.siglip if self.config.conditioning == "captions" else None

    def start(self, workdir: Path) -> None:
        """Notes which SigLIP reads the captions."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_digest(workdir, None, siglip=self._reader())

    def evaluate(
        self, model: ConditionTable, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        model = own_copy(model)
        results = super().evaluate(model, workdir)
        held_out = self.data.held_out
        rows = np.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).astype(int).tolist()
        labels = np.array([held_out.label(row) for row in rows], np.int32)
        samples = [image for drawn in self.evaluation.sampler(model).batches(labels) for image in drawn.images]
        pictures = [held_out[row].pixels for row in rows]
        texts = [self.descriptions.texts[label] for label in labels]
        save_sheet(samples, texts, workdir / "captions.png", pictures)
        return results
