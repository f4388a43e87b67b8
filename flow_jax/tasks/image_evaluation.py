"""Scores of a flow of images against real ones; and its pictures. Axes: N images of each side."""

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
from flow_jax.data.image_sets import Pictures
from flow_jax.metrics import distances
from flow_jax.metrics.frechet import FrechetScore, features_of
from flow_jax.metrics.moments import Moments, frechet
from flow_jax.ode import likelihood, sampling
from flow_jax.row_keys import row_keys
from flow_jax.tasks import image_figures
from flow_jax.tasks.flow_task import solver
from flow_jax.tasks.image_figures import Gallery
from flow_jax.tasks.image_sampler import Sampler, batches_of, spread
from train_jax.core.row_errors import BadRow, BadRows

FRAMES = 9  # of the picture of the flow
FOLLOWED = 1000  # samples whose way is measured
SIDES = ("held_out", "train")


class Evaluation:
    """Measures models on one set of images. Moments of real images are computed once.

    Args:
      data: the images.
      path: which the models are trained along.
      settings, options: the config's `data` and `eval`.
      mesh: whose devices share the samples.
    """

    def __init__(self, data: ImageData, path: Any, settings: ConfigDict, options: ConfigDict, mesh: Mesh):
        self.data, self.path, self.settings, self.options, self.mesh = data, path, settings, options, mesh
        self._moments: dict[str, Moments] = {}

    @functools.cached_property
    def features(self) -> Callable[[np.ndarray], np.ndarray]:
        """What Frechet distances are measured in."""
        return features_of(self.options.features)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """The Frechet distance between `validation_samples` samples and real images."""
        score = FrechetScore(self.features, self.moments(self.options.reference))
        self.score(model, self.labels(self.options.validation_samples), [score])
        return score.results()

    def evaluate(self, model: nnx.Module, workdir: Path) -> dict[str, Any]:
        """What `eval.json` holds, of one sample for every held-out image and label (or `num_samples`); the pictures.

        frechet           between features of samples and real images; frechet_data: of training and held-out ones
        bpd               bits per dimension of held-out images
        nfe               evaluations of the model for the samples
        straightness      mean square of |velocity - (x_1 - x_0)| along the way, 0 for straight lines
        and what the data measure of their own (image_datasets.ImageData.scores)
        """
        labels = self.labels(self.options.num_samples or len(self.data.held_out))
        gallery, real = (Gallery(self.data.num_classes if self.data.row_a_label else 0) for _ in range(2))
        scores = [FrechetScore(self.features, self.moments(self.options.reference)), *self.data.scores(), gallery]
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
        for images, shown in self.read(held_out, rows_of(len(held_out), min(gallery.wanted, len(held_out)))):
            real.add(images, shown)
        image_figures.draw_grid(workdir / "samples.png", gallery, real, self.data.levels)
        image_figures.draw_flow(workdir / "flow.png", self._frames(model))
        return results

    def score(
        self, model: nnx.Module, labels: Int[np.ndarray, " N"], scores: Iterable[Score], told=None
    ) -> int | float:
        """Draws a sample of each label and gives them to the scores; returns the mean of evaluations a sample.

        `told(number)` hears how many were drawn.
        """
        evaluations = 0
        for drawn in self.sampler(model).batches(labels):
            for score in scores:
                score.add(drawn.images, drawn.labels)
            evaluations += drawn.nfe * len(drawn.labels)
            if told is not None:
                told(len(drawn.labels))
        nfe = evaluations / len(labels)
        return int(nfe) if nfe.is_integer() else nfe

    def sampler(self, model: nnx.Module) -> Sampler:
        """Draws samples as the config says."""
        return Sampler(model, self.data, self.path, self.options, self.settings.dequantize, self.mesh)

    def labels(self, number: int) -> Int[np.ndarray, " {number}"]:
        """Labels of held-out images spread over all of them, 0 where there are none."""
        held_out = self.data.held_out
        if not self.data.num_classes:
            return np.zeros(number, np.int32)
        found = []
        for row in rows_of(len(held_out), number):
            try:
                found.append(held_out.label(int(row)))
            except BadRow:  # is counted where its pixels are wanted; the neighbour's label stands in
                found.append(found[-1] if found else 0)
        return np.array(found, np.int32)

    def moments(self, side: str, told=None) -> Moments:
        """Of `reference_examples` images of "train" or "held_out", spread over all of them; `told` as in `score`."""
        if side not in self._moments:
            pictures, moments = getattr(self.data, side), Moments()
            rows = rows_of(len(pictures), min(len(pictures), self.options.reference_examples))
            for images, _ in self.read(pictures, rows):
                moments.add(self.features(images))
                if told is not None:
                    told(len(images))
            self._moments[side] = moments
        return self._moments[side]

    def read(self, pictures: Pictures, rows: Int[np.ndarray, " N"]):
        """Images and labels of some rows in batches, without bad ones, see image_datasets.read."""
        settings = self.settings
        tally = BadRows(len(rows), settings.on_error, settings.max_bad_fraction)
        return image_datasets.read(pictures, rows, tally, settings.threads)

    def bits_per_dim(self, model: nnx.Module) -> float:
        """Mean over held-out images, without guidance."""
        held_out, options = self.data.held_out, self.options
        found, labels = [], []
        for images, shown in self.read(held_out, rows_of(len(held_out), options.likelihood_examples)):
            found.append(images)
            labels.append(shown)
        images, labels = np.concatenate(found), np.concatenate(labels)
        bits = []
        for rows, good in batches_of(len(images), options.batch_size):
            args = (jnp.asarray(labels[rows]),) if self.data.num_classes else ()
            images_on, args = spread((jnp.asarray(images[rows]), args), self.mesh)
            batch = likelihood.image_bits_per_dim(
                model,
                images_on,
                row_keys(jax.random.key(options.seed + 1), rows),
                options.likelihood_samples,
                levels=self.data.levels,
                divergence=options.divergence,
                args=args,
                prior=likelihood.start_log_prob(self.path.start),
                **solver(options),
            )
            bits += np.asarray(batch)[:good].tolist()
        return float(np.mean(bits))

    def straightness(self, model: nnx.Module, labels: Int[np.ndarray, " N"]) -> float:
        """Of the flow that is sampled from, over the first samples."""
        sampler, number = self.sampler(model), min(len(labels), FOLLOWED)
        found = 0.0
        for rows, good in batches_of(number, self.options.batch_size):
            x_0, args = jax.tree.map(lambda array, good=good: array[:good], sampler.start(rows, labels))
            found += good * distances.straightness(sampler.velocity, x_0, args=args)
        return found / number

    def _frames(self, model: nnx.Module) -> np.ndarray:
        """Samples on their way [T, 10, I, I, C] in the model's range: of the first labels one each."""
        sampler = self.sampler(model)
        number = min(self.data.num_classes or image_figures.ROWS, image_figures.ROWS)
        x_0, args = sampler.start(np.arange(number), np.arange(number, dtype=np.int32))
        grid = jnp.linspace(0.0, 1.0, FRAMES)
        ways = sampling.sample(sampler.velocity, x_0, "rk4", times=grid, trajectory=True, args=args)
        return np.asarray(ways.trajectory)


def rows_of(length: int, number: int) -> Int[np.ndarray, " {number}"]:
    """`number` rows spread evenly over `length`; more than there are go around."""
    if number > length:
        return np.arange(number) % length
    return np.linspace(0, length - 1, number).astype(int)
