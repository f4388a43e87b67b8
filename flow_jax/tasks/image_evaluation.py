"""Evaluates a flow of images: scores against real images, and figures."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from flow_jax.data import image_datasets
from flow_jax.data.image_datasets import ImageData, Score
from flow_jax.data.image_sets import ImageSet
from flow_jax.metrics import distances
from flow_jax.metrics.frechet import FrechetScore, features_of
from flow_jax.metrics.moments import Moments, frechet
from flow_jax.ode import likelihood, sampling
from flow_jax.row_keys import row_keys
from flow_jax.tasks import image_figures
from flow_jax.tasks.flow_task import solver_arguments
from flow_jax.tasks.image_figures import Gallery
from flow_jax.tasks.image_sampler import ImageSampler, batches_of, shard_rows
from train_jax.core.row_errors import BadRow, BadRows

FRAMES = 9  # times shown in flow.png
STRAIGHTNESS_SAMPLES = 1000
SPLITS = ("held_out", "train")


class ImageEvaluation:
    """Evaluates models on one data set; moments of real images are computed once.

    Args:
      data: the images.
      path: the path along which the models are trained.
      settings, options: the config's `data` and `eval`.
      mesh: devices over which samples are divided.
    """

    def __init__(self, data: ImageData, path: Any, settings: ConfigDict, options: ConfigDict, mesh: Mesh):
        self.data, self.path, self.settings, self.options, self.mesh = data, path, settings, options, mesh
        self._moments: dict[str, Moments] = {}

    @functools.cached_property
    def features(self) -> Callable[[np.ndarray], np.ndarray]:
        """The features of Frechet distances."""
        return features_of(self.options.features)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Returns the Frechet distance between `validation_samples` samples and real images."""
        score = FrechetScore(self.features, self.moments(self.options.reference))
        self.score(model, self.labels(self.options.validation_samples), [score])
        return score.results()

    def evaluate(self, model: nnx.Module, workdir: Path) -> dict[str, Any]:
        """Returns the content of `eval.json` for one sample per held-out image (or `num_samples`), and draws figures.

        frechet           between features of samples and real images; frechet_data: of training and held-out images
        bpd               bits per dimension of held-out images
        nfe               evaluations of the model per sample
        straightness      mean of |velocity - (x_1 - x_0)|^2 along trajectories, 0 for straight lines
        and the scores of the data (image_datasets.ImageData.scores)
        """
        labels = self.labels(self.options.num_samples or len(self.data.held_out))
        gallery, real = (Gallery(self.data.num_classes if self.data.row_per_label else 0) for _ in range(2))
        frechet_score = FrechetScore(self.features, self.moments(self.options.reference))
        scores: list[Score] = [frechet_score, *self.data.scores(), gallery]
        nfe = self.score(model, labels, scores)
        results: dict[str, Any] = {"examples": len(labels)}
        for score in scores:
            results |= score.results()
        results |= {
            "frechet_data": frechet(self.moments("held_out"), self.moments("train")),
            "bpd": self.bits_per_dim(model),
            "nfe": nfe,
            "straightness": self.straightness(model, labels),
        }
        held_out = self.data.held_out
        rows = rows_of(len(held_out), min(gallery.num_candidates, len(held_out)))
        for images, real_labels in self.read(held_out, rows):
            real.add(images, real_labels)
        image_figures.draw_grid(workdir / "samples.png", gallery, real, self.data.levels)
        image_figures.draw_flow(workdir / "flow.png", self._frames(model))
        return results

    def score(
        self,
        model: nnx.Module,
        labels: Int[np.ndarray, " N"],
        scores: Iterable[Score],
        on_progress: Callable[[int], Any] | None = None,
    ) -> int | float:
        """Draws a sample for each label and adds it to the scores; returns the mean number of evaluations per sample.

        `on_progress` is called with the number of new samples after each batch.
        """
        evaluations = 0
        for batch in self.sampler(model).batches(labels):
            for score in scores:
                score.add(batch.images, batch.labels)
            evaluations += batch.nfe * len(batch.labels)
            if on_progress is not None:
                on_progress(len(batch.labels))
        nfe = evaluations / len(labels)
        return int(nfe) if nfe.is_integer() else nfe

    def sampler(self, model: nnx.Module) -> ImageSampler:
        """Returns a sampler with the config's options."""
        return ImageSampler(model, self.data, self.path, self.options, self.settings.dequantize, self.mesh)

    def labels(self, number: int) -> Int[np.ndarray, " {number}"]:
        """Returns labels of evenly spaced held-out images, or zeros without labels."""
        held_out = self.data.held_out
        if not self.data.num_classes:
            return np.zeros(number, np.int32)
        labels = []
        for row in rows_of(len(held_out), number):
            try:
                labels.append(held_out.label(int(row)))
            except BadRow:  # counted where its pixels are read; here the previous label replaces it
                labels.append(labels[-1] if labels else 0)
        return np.array(labels, np.int32)

    def moments(self, split: str, on_progress: Callable[[int], Any] | None = None) -> Moments:
        """Returns the moments of `reference_examples` evenly spaced images of "train" or "held_out".

        `on_progress` is called with the number of new images after each batch.
        """
        if split not in self._moments:
            image_set, moments = self.images(split), Moments()
            rows = rows_of(len(image_set), min(len(image_set), self.options.reference_examples))
            for images, _ in self.read(image_set, rows):
                moments.add(self.features(images))
                if on_progress is not None:
                    on_progress(len(images))
            self._moments[split] = moments
        return self._moments[split]

    def images(self, split: str) -> ImageSet:
        """Returns the images of a split, "train" or "held_out"."""
        return self.data.train if split == "train" else self.data.held_out

    def read(self, image_set: ImageSet, rows: Int[np.ndarray, " N"]):
        """Yields images and labels of the given rows in batches, without bad rows; see image_datasets.read."""
        settings = self.settings
        bad_rows = BadRows(len(rows), settings.on_error, settings.max_bad_fraction)
        return image_datasets.read(image_set, rows, bad_rows, settings.threads)

    def bits_per_dim(self, model: nnx.Module) -> float:
        """Returns the mean bits per dimension of held-out images, without guidance."""
        held_out, options = self.data.held_out, self.options
        rows = rows_of(len(held_out), options.likelihood_examples)
        batches = list(self.read(held_out, rows))
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        bits = []
        for rows, good in batches_of(len(images), options.batch_size):
            args = (jnp.asarray(labels[rows]),) if self.data.num_classes else ()
            device_images, args = shard_rows((jnp.asarray(images[rows]), args), self.mesh)
            batch = likelihood.image_bits_per_dim(
                model,
                device_images,
                row_keys(jax.random.key(options.seed + 1), rows),
                options.likelihood_samples,
                levels=self.data.levels,
                divergence=options.divergence,
                args=args,
                prior=likelihood.start_log_prob(self.path.start),
                **solver_arguments(options),
            )
            bits += np.asarray(batch)[:good].tolist()
        return float(np.mean(bits))

    def straightness(self, model: nnx.Module, labels: Int[np.ndarray, " N"]) -> float:
        """Returns the straightness of the first samples' trajectories, with guidance."""
        sampler, number = self.sampler(model), min(len(labels), STRAIGHTNESS_SAMPLES)
        total = 0.0
        for rows, good in batches_of(number, self.options.batch_size):
            x_0, args = jax.tree.map(lambda array, good=good: array[:good], sampler.start(rows, labels))
            total += good * distances.straightness(sampler.velocity, x_0, args=args)
        return total / number

    def _frames(self, model: nnx.Module) -> np.ndarray:
        """Returns trajectories [T, N, I, I, C] in [-1, 1], one for each of the first labels, at most 10."""
        sampler = self.sampler(model)
        number = min(self.data.num_classes or image_figures.ROWS, image_figures.ROWS)
        x_0, args = sampler.start(np.arange(number), np.arange(number, dtype=np.int32))
        grid = jnp.linspace(0.0, 1.0, FRAMES)
        result = sampling.sample(sampler.velocity, x_0, "rk4", times=grid, trajectory=True, args=args)
        return np.asarray(result.trajectory)


def rows_of(length: int, number: int) -> Int[np.ndarray, " {number}"]:
    """Returns `number` evenly spaced row numbers below `length`, or all of them in turn if there are fewer."""
    if number > length:
        return np.arange(number) % length
    return np.linspace(0, length - 1, number).astype(int)
