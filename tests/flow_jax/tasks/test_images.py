"""The task of image flows, on real digits: its training source, loss and scores, and the files of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train
from flow_jax.data import digit_scores, digits
from flow_jax.data.digits import Digits
from flow_jax.data.image_datasets import ImageData
from flow_jax.data.image_pairs import ImagePairs, to_levels, to_range
from flow_jax.data.image_sets import ArrayImages
from flow_jax.tasks.images import ImageFlow
from tests.paligemma_jax.mini import ROOT, arguments, config_of
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

pytest.importorskip("sklearn")
DIGITS = str(ROOT / "configs/flow_digits.py")
SMALL = {
    "model.unet.width": 8,
    "model.unet.multipliers": "(1,)",
    "model.unet.attention": "()",
    "model.unet.head_width": 8,
    "mesh.data": 1,
    "eval.solver": "euler",
    "eval.num_steps": 2,
    "eval.likelihood_examples": 2,
    "eval.validation_samples": 20,
}


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


def task_of(**changes):
    config = config_of(SMALL | changes, DIGITS)
    return ImageFlow(config, sharding.make_mesh(config.mesh))


# Data.


def test_the_split_keeps_classes_and_shares_no_image():
    train_part, held_out = digits.load("train"), digits.load("held_out")
    assert len(train_part.labels) + len(held_out.labels) == 1797
    counts = [np.bincount(part.labels) for part in (train_part, held_out)]
    np.testing.assert_allclose(counts[0] / (counts[0] + counts[1]), 2 / 3, atol=0.01)
    rows = {image.tobytes() for image in train_part.images}
    assert sum(image.tobytes() in rows for image in held_out.images) == 0
    assert train_part.images.max() == digits.LEVELS - 1


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("levels", [17, 256])
def test_grey_values_are_recovered(levels, dequantize):
    images = np.arange(levels, dtype=np.uint8).reshape(-1, 1, 1, 1)
    x = to_range(images, levels, np.random.default_rng(0) if dequantize else None)
    assert x.min() >= -1 and x.max() <= 1 and x.dtype == np.float32
    np.testing.assert_array_equal(to_levels(x, levels, dequantize), images)


def images_of(number: int) -> Digits:
    rng = np.random.default_rng(0)
    return Digits(rng.integers(0, 17, (number, 4, 4, 1)).astype(np.uint8), np.arange(number) % 3)


def pairs_of(coupling: str, dequantize: bool = False, seed: int = 3) -> ImagePairs:
    image_set = ArrayImages(*images_of(30))
    return ImagePairs(ImageData(image_set, image_set, 4, 1, 17, 3), dequantize, coupling, seed)


def test_exact_pairs_have_the_least_cost_within_each_class():
    rows = np.arange(30)
    plain, coupled = (pairs_of(name).get_batch(rows, 7) for name in ("independent", "exact"))

    def cost(step):
        return float(np.square(step["x_0"] - step["x_1"]).sum())

    assert cost(coupled) < cost(plain)
    for name in ("x_0", "x_1"):
        np.testing.assert_allclose(np.sort(plain[name], axis=None), np.sort(coupled[name], axis=None))
    by_image = {image.tobytes(): label for image, label in zip(plain["x_1"], plain["label"], strict=True)}
    assert [by_image[image.tobytes()] for image in coupled["x_1"]] == coupled["label"].tolist()
    noise_of_class = [{noise.tobytes() for noise in plain["x_0"][plain["label"] == label]} for label in range(3)]
    for noise, label in zip(coupled["x_0"], coupled["label"], strict=True):
        assert noise.tobytes() in noise_of_class[label]


def test_rows_are_a_function_of_seed_and_step():
    one, again = (pairs_of("exact", True).get_batch(np.arange(8), 2) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    other = pairs_of("exact", True).get_batch(np.arange(8), 3)
    assert not np.array_equal(one["x_0"], other["x_0"]) and not np.array_equal(one["x_1"], other["x_1"])


# Loss.


def test_labels_are_dropped_row_by_row_and_reach_the_model():
    """What the model gets: the rows' labels, and none for the share that is dropped."""
    task = task_of(**{"model.label_dropout": 0.5})
    labels = jnp.arange(1000) % 10
    batch = {"x_0": jnp.zeros((1000, 8, 8, 1)), "x_1": jnp.zeros((1000, 8, 8, 1)), "label": labels}
    seen = []

    class Watched(nnx.Module):
        def __call__(self, t, x, labels, dropout_keys):
            seen.append((labels, dropout_keys))
            return jnp.zeros_like(x)

    loss, _ = task.loss(Watched(), batch, jax.random.split(jax.random.key(0), 1000))
    ((model_labels, dropout_keys),) = seen
    dropped = np.asarray(model_labels == digits.CLASSES)
    assert loss == 0 and dropout_keys.shape == (1000,)
    assert dropped.mean() == pytest.approx(0.5, abs=0.06)
    np.testing.assert_array_equal(model_labels[~dropped], labels[~dropped])


def test_the_blueprint_has_the_rows_of_the_training_source():
    task = task_of()
    blueprint = ImageFlow.blueprint(task.config, task.mesh)
    row = task.train_source()[0]
    assert not row.pop("bad")  # which batches do not hold
    assert {name: (np.shape(array), array.dtype) for name, array in row.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in blueprint.example.items()
    }


# Scores.


def test_scores_of_real_digits_are_those_of_real_digits():
    """Held-out digits as samples: near as themselves, read as well, and as diverse; training images are too near."""
    train_part, held_out = digits.load("train"), digits.load("held_out")
    assert digit_scores.class_mmd(held_out, held_out) == pytest.approx(0, abs=1e-6)
    spread = digit_scores.mmd_of_data(train_part, held_out, seed=0)
    assert 0 < spread < 0.3
    noise = held_out._replace(images=np.full_like(held_out.images, 8))
    assert digit_scores.class_mmd(noise, held_out) > 3 * spread
    machine = digits.classifier(train_part)
    assert digit_scores.accuracy(machine, held_out) > 0.98
    assert digit_scores.nearest(train_part.images[:50], train_part) == 0
    assert digit_scores.nearest(held_out.images[:50], train_part) > 5


def test_a_run_writes_results_and_figures(tmp_path):
    changes = SMALL | {
        "total_steps": 4,
        "eval_steps": 4,
        "checkpoint_steps": 4,
        "log_steps": 2,
        "batch_size": 16,
        "optimizer.warmup_steps": 1,
        "eval.guidance": 1.5,
    }
    train.main(arguments(tmp_path, changes, "--progress=none", config=DIGITS))
    results = json.loads((tmp_path / "eval.json").read_text())
    assert {"frechet", "bpd", "nfe", "straightness", "accuracy", "mmd_ratio", "nearest_ratio"} <= results.keys()
    assert results["examples"] == len(digits.load("held_out").labels) and 0 <= results["accuracy"] <= 1
    for name in ("samples", "flow"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.name": "vit"}, "config.model.name='vit', expected one of unet, dit"),
        ({"coupling.name": "sinkhorn"}, "coupling.name is 'sinkhorn', which pairs across classes"),
        ({"data.name": "letters"}, "data.name is 'letters', expected one of digits, shapes, folder, tfds"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        task_of(**changes)


def test_sizes_that_do_not_match_are_one_sentence(tmp_path):
    changes = SMALL | {"model.unet.attention": "(3,)"}
    with pytest.raises(UserError, match="model.unet: attention at"):
        task_of(**changes).init()
