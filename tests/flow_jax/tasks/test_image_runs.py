"""Runs on folders and TFDS data, their scores, `flow_jax.fid`; and the models of configs/flow_images.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
import train
from flow_jax import fid
from flow_jax.data.image_datasets import ImageData
from flow_jax.data.image_sets import ArrayImages
from flow_jax.metrics import frechet
from flow_jax.tasks import image_sampler
from flow_jax.tasks.image_figures import Gallery
from flow_jax.tasks.image_sampler import ImageSampler
from flow_jax.tasks.images import ImageFlow
from tests.flow_jax.images_on_disk import colours, pixels, prepare, write_folder
from tests.paligemma_jax.mini import ROOT, arguments, config_of, mistake
from train_jax.config import command_line
from train_jax.config.base import base_config, read_config
from train_jax.core.errors import UserError
from train_jax.evaluate import load_model
from train_jax.optim import optimizers
from train_jax.parallel import sharding

CONFIG = str(ROOT / "configs/flow_images.py")
SMALL = {
    "data.image_size": 8,
    "model.unet.width": 8,
    "model.unet.multipliers": "(1,)",
    "model.unet.attention": "()",
    "model.unet.head_width": 8,
    "mesh.data": 1,
    "batch_size": 8,
    "data.max_bad_fraction": 0.2,
    "data.threads": 0,
    "eval.num_samples": 4,
    "eval.validation_samples": 4,
    "eval.batch_size": 4,
    "eval.solver": "euler",
    "eval.num_steps": 2,
    "eval.likelihood_examples": 2,
    "eval.likelihood_samples": 2,
}
LENGTH = {"total_steps": 4, "eval_steps": 4, "checkpoint_steps": 2, "log_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A run on class folders, of which one training picture is broken."""
    folder = write_folder(tmp_path_factory.mktemp("pictures"), broken=("b/04.png",))
    held_out = write_folder(tmp_path_factory.mktemp("held_out"), each=5)
    places = {"data.name": "folder", "data.folder": str(folder), "data.held_out_folder": str(held_out)}
    return SMALL | LENGTH | places


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """Its workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train.main(arguments(workdir, options, "--progress=none", config=f"{CONFIG}:smoke"))
    return workdir


def parameters(workdir, step):
    config = read_config(workdir / "config.json")
    model = load_model(config, workdir, step)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def test_a_run_on_folders_writes_results_and_figures_and_counts_bad_files(run):
    results = json.loads((run / "eval.json").read_text())
    assert {"frechet", "frechet_data", "bpd", "nfe", "straightness"} <= results.keys()
    assert results["examples"] == 4 and results["nfe"] == 2 and "accuracy" not in results
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["bad_rows"] == 1 or any(line.get("bad_rows") == 1 for line in lines)
    for name in ("samples", "flow"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_gives_the_same_parameters(run, options, tmp_path):
    for steps in (2, 4):
        changes = options | {"total_steps": steps, "eval_steps": steps}
        train.main(arguments(tmp_path, changes, "--progress=none", config=f"{CONFIG}:smoke"))
    for one, other in zip(parameters(run, 4), parameters(tmp_path, 4), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_on_tfds_without_labels(tmp_path):
    """The recipe of the paper with another model and length."""
    places = {"data.folder": str(prepare(tmp_path / "data")), "optimizer.warmup_steps": 1, "eval.solver": "euler"}
    changes = SMALL | LENGTH | places | {"total_steps": 2, "eval_steps": 2}
    train.main(arguments(tmp_path / "run", changes, "--progress=none", config=f"{CONFIG}:torchcfm,coupling=exact"))
    results = json.loads((tmp_path / "run/eval.json").read_text())
    assert {"frechet", "bpd", "nfe", "straightness"} <= results.keys() and results["finished"]


def test_an_evaluation_does_not_depend_on_its_batch_size(run, tmp_path):
    config = read_config(run / "config.json")
    config.eval.likelihood_examples, config.eval.num_samples = 5, 7
    model, scores = load_model(config, run), []
    for size in (7, 3):
        config.eval.batch_size = size
        results = ImageFlow(config, sharding.make_mesh(config.mesh)).evaluate(model, tmp_path)
        scores.append([results[name] for name in ("frechet", "bpd", "straightness")])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


def test_fid_is_the_frechet_distance_of_all_samples_at_once(run, options, capsys):
    chosen = ["--features=tests.flow_jax.images_on_disk:colours", "--num_samples=11", "--reference=train"]
    fid.main(["fid", str(run), *chosen, "--solver=heun", "--num_steps=3", "--batch_size=4"])
    result = json.loads((run / "fid.json").read_text())
    assert result["nfe"] == 6 and result["samples"] == 11 and result["real_images"] == 29
    config = read_config(run / "config.json")
    config.eval.solver, config.eval.num_steps = "heun", 3
    task = ImageFlow(config, sharding.make_mesh(config.mesh))
    labels = task.evaluation.labels(11)
    sampler = ImageSampler(load_model(config, run), task.data, task.path, config.eval, True, task.mesh)
    samples = np.concatenate([drawn.images for drawn in sampler.batches(labels)])
    good = [pixels(100 * label + number) for label in range(3) for number in range(10) if (label, number) != (1, 4)]
    want = fj.metrics.frechet_distance(colours(samples), colours(np.stack(good)))
    assert result["frechet"] == pytest.approx(want, rel=1e-6)
    assert "frechet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--features=inception"], "eval.features='inception', expected 'package.module:function'"),
        (["--features=nowhere_at_all:f"], "eval.features='nowhere_at_all:f': there is no module 'nowhere_at_all'"),
        (["--features=tests.flow_jax.images_on_disk:flat"], "returned an array .. of float64 for 15 images"),
        (["--reference=test"], "config.eval.reference='test', expected one of held_out, train"),
        (["--num_samples=many"], "config.eval.num_samples='many', expected int"),
    ],
)
def test_fid_refuses(flags, sentence, run, capsys):
    with pytest.raises(UserError, match=sentence):
        fid.main(["fid", str(run), *flags])


def test_fid_refuses_a_run_without_images(tmp_path):
    with pytest.raises(UserError, match="is a run of flow_jax.tasks.plane:PlaneFlow, expected one of flow_jax.tasks"):
        fid.fid(base_config("flow_jax.tasks.plane:PlaneFlow"), tmp_path)


# Scores and samples.


class Field(nnx.Module):
    """A velocity that is known."""

    def __call__(self, t, x, labels=None, dropout_keys=None):
        push = 0.0 if labels is None else labels[:, None, None, None] * 0.1
        return push - 0.5 * x


def data_of(classes: int = 3) -> ImageData:
    image_set = ArrayImages(np.stack([pixels(row) for row in range(20)]), np.arange(20) % max(classes, 1))
    return ImageData(image_set, image_set, 8, 3, 256, classes)


def sampler_of(batch_size: int, devices: int = 1, **changes) -> ImageSampler:
    config = config_of(SMALL | {"mesh.data": devices, "eval.batch_size": batch_size} | changes, f"{CONFIG}:smoke")
    return ImageSampler(Field(), data_of(), fj.paths.CondOT(), config.eval, True, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize(("batch_size", "devices"), [(3, 1), (100, 1), (8, 8)])
def test_samples_depend_neither_on_batches_nor_on_devices(batch_size, devices):
    labels = np.array([0, 1, 2, 2, 1, 0, 1, 2, 0, 1, 2])
    one = np.concatenate([sample.images for sample in sampler_of(1).batches(labels)])
    drawn = list(sampler_of(batch_size, devices).batches(labels))
    images, shown = (np.concatenate([getattr(sample, name) for sample in drawn]) for name in ("images", "labels"))
    assert len(drawn) == -(-11 // batch_size) and shown.tolist() == labels.tolist()
    assert np.abs(images.astype(int) - one).max() <= 1  # rounding to grey values
    x_0 = np.asarray(image_sampler.noise(1000, jnp.arange(11), (8, 8, 3)))
    want = np.asarray(fj.sample(Field(), x_0, "euler", 2, args=(jnp.asarray(labels),)).x)
    np.testing.assert_allclose(images, np.clip((want + 1) * 128, 0, 255.99), atol=1.01)


def test_pixels_of_large_images_are_means_of_areas():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    blocks = images.reshape(2, 32, 2, 32, 2, 3).mean(axis=(2, 4)).reshape(2, -1)
    np.testing.assert_allclose(frechet.pixels(images), blocks)
    np.testing.assert_array_equal(frechet.pixels(images[:, :8, :8]), images[:, :8, :8].reshape(2, -1))
    np.testing.assert_allclose(frechet.area_means(48, 32).sum(axis=1), 1)
    np.testing.assert_allclose(frechet.area_means(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_a_gallery_has_one_row_per_label():
    gallery = Gallery(num_classes=3)
    images = np.stack([np.full((2, 2, 1), label, np.uint8) for label in (2, 0, 2, 5)])
    gallery.add(images, np.array([2, 0, 2, 5]))
    assert [len(row) for row in gallery.rows] == [1, 0, 2]
    sheet = gallery.sheet(levels=17)
    assert sheet.shape == (9, 30, 1) and sheet[3:6].min() == 16  # a line behind each
    assert (sheet[6:8, [0, 1, 3, 4]] == 2).all() and (sheet[6:8, [2, 5]] == 16).all()
    plain = Gallery(num_classes=0)
    plain.add(np.zeros((120, 2, 2, 3), np.uint8), np.zeros(120, np.int32))
    assert [len(row) for row in plain.rows] == [10] * 10


# Loss.


def test_rows_of_weight_zero_do_not_affect_the_loss():
    task = ImageFlow(*_task_of("smoke"))
    seen = []

    class Watched(nnx.Module):
        def __call__(self, t, x, labels, dropout_keys):
            seen.append((labels, dropout_keys))
            return jnp.zeros_like(x)

    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))
    batch = {"x_0": x_0, "x_1": x_1, "weight": jnp.array([1.0, 0.0, 1.0])}
    loss, _ = task.loss(Watched(), batch, jax.random.split(jax.random.key(1), 3))
    rows = np.square(np.asarray(x_1 - x_0)).mean(axis=(1, 2, 3))
    assert loss == pytest.approx(rows[0] + rows[2], rel=1e-5)
    assert task.normalizer({"x_1": x_1[None], "weight": batch["weight"][None]}) == 2
    assert task.normalizer({"x_1": x_1[None], "weight": jnp.zeros((1, 3))}) == 1
    ((labels, dropout_keys),) = seen
    assert labels is None and dropout_keys.shape == (3,)  # dropout goes on without labels


# The configs.


def _task_of(argument: str, **changes):
    config = config_of({"mesh.data": 1} | changes, f"{CONFIG}:{argument}")
    return config, sharding.make_mesh(config.mesh)


@pytest.mark.parametrize(
    ("argument", "count"),
    [  # of torchcfm's UNetModel with scale-shift norms and resampling in residual blocks, which is ADM's
        ("cifar10", 171_268_099),
        ("imagenet32", 228_149_507),
        ("imagenet64", 295_131_267),
        ("imagenet128", 542_804_483),
        ("torchcfm", 42_855_427),
    ],
)
def test_the_models_of_the_papers_have_their_number_of_parameters(argument, count):
    """Told without data."""
    config, mesh = _task_of(argument)
    blueprint = ImageFlow.blueprint(config, mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(blueprint.model))) == count
    assert blueprint.example["x_1"].shape == (config.data.image_size,) * 2 + (3,) and "label" not in blueprint.example


def test_the_papers_schedule():
    """Table 3: linear to the peak in 45,000 updates, then linear to 1e-8 at the last of 391,000."""
    config, _ = _task_of("cifar10")
    schedule = optimizers.make_schedule(config.optimizer, config.total_steps, config.optimizer.warmup_steps)
    assert float(schedule(45_000)) == pytest.approx(5e-4) and float(schedule(22_500)) == pytest.approx(2.5e-4)
    assert float(schedule(218_000)) == pytest.approx(2.5e-4, rel=1e-3)
    assert float(schedule(391_000)) == pytest.approx(1e-8, rel=0.1)
    assert float(schedule(0)) <= 1e-8


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("cifar10,imagenet32", "cifar10 and imagenet32 exclude each other, expected one"),
        ("cifar10,coupling=exact", "coupling=exact needs torchcfm"),
    ],
)
def test_contradictory_variants_are_refused(argument, sentence):
    with pytest.raises(UserError, match=sentence):
        command_line.load_config(f"{CONFIG}:{argument}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.folder": "/nowhere"}, "/nowhere has no dataset_info.json"),
        ({"eval.guidance": 2.0}, "expected 1: guidance needs labels"),
        (
            {"eval.guidance": 2.0, "model.label_dropout": 0.0},
            "guidance needs a model that is also trained without labels",
        ),
        ({"eval.divergence": "foo"}, "config.eval.divergence='foo', expected one of exact, hutchinson"),
        ({"data.channels": 2}, "config.data.channels=2, expected one of 1, 3"),
    ],
)
def test_a_mistake_is_one_sentence(changes, sentence, capsys, tmp_path):
    assert sentence in mistake(capsys, SMALL | changes, tmp_path / "run", config=f"{CONFIG}:torchcfm")
