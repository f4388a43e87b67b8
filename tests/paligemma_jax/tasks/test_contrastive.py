"""A dual encoder trained through the runtime: a run from end to end, its loss, what is locked and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax import losses
from paligemma_jax.models.dual_variants import variant
from paligemma_jax.tasks import contrastive
from paligemma_jax.tasks.contrastive import Contrastive
from tests.paligemma_jax.mini import ROOT, config_of
from train_jax import loop, params, sharding
from train_jax.config import from_json
from train_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = str(ROOT / "configs/siglip.py")
SMALL = dict(width=16, depth=1, mlp_dim=24, num_heads=2)
OPTIONS = {
    "data.num_scenes": 8,
    "data.num_held_out": 6,
    "data.build_workers": 1,
    "data.text_length": 24,
    "data.threads": 0,
    "init.vision": None,
    "batch_size": 8,
    "total_steps": 4,
    "eval_steps": 4,
    "checkpoint_steps": 4,
    "log_steps": 2,
    "mesh.data": 1,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def mini():
    """The tiny variant made smaller still, with the word table that its tokenizer needs."""
    tiny = variant("tiny")
    small = tiny.replace(vision=SMALL | {"image_size": 24}, text=SMALL, embed_dim=16)
    small = dataclasses.replace(small, preprocessing=dataclasses.replace(small.preprocessing, size=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "variant", lambda name: small if name == "tiny" else variant(name))
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return {"data.cache_dir": str(tmp_path_factory.mktemp("cache"))} | OPTIONS


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A finished run; read-only."""
    workdir = tmp_path_factory.mktemp("runs") / "siglip"
    loop.fit(config_of(options, CONFIG), workdir, "none")
    return workdir


def task_of(options, **changes):
    config = config_of(options | changes, CONFIG)
    return Contrastive(config, sharding.make_mesh(config.mesh))


def batch_of(task, number=8):
    source = task.train_source()
    rows = [source[index] for index in range(number)]
    return {name: jnp.stack([jnp.asarray(row[name]) for row in rows]) for name in rows[0]}


def test_a_run_measures_and_draws(run):
    results = json.loads((run / "eval.json").read_text())
    assert set(Contrastive.validation_metrics) <= results.keys()
    assert all(0 <= results[name] <= 1 for name in Contrastive.validation_metrics)
    assert 0 <= results["calibration_error"] <= 1
    for name in ("similarity", "neighbours", "calibration"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_a_model_with_a_tokenizer(run, options):
    model = pg.load(run)
    assert isinstance(model, pg.DualEncoder)
    trained = loop.load_model(from_json((run / "config.json").read_text()), run, "best")
    for path, array in params.flatten(trained).items():
        np.testing.assert_array_equal(params.flatten(model)[path], array, err_msg=path)
    words = pg.load_text_tokenizer(run, model.config.text.length)
    theirs = task_of(options).tokenizer
    for ours, expected in zip(words(["a red Cube"]), theirs(["a red Cube"]), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_the_loss_is_of_all_pairs_whatever_is_embedded_at_once(options, name):
    """Against the loss of the embeddings, and its gradient with micro-batches against that without."""
    tasks = [task_of(options, **{"loss.name": name, "embed_micro_batch": size}) for size in (None, 2)]
    graph, arrays = params.split(tasks[0].init())
    batch = batch_of(tasks[0])

    def loss(task, arrays):
        return task.loss(params.merge(graph, arrays), batch, None)[0]

    (value, grads), (again, others) = (jax.value_and_grad(lambda a, task=task: loss(task, a))(arrays) for task in tasks)
    model = tasks[0].init()
    images = model.config.preprocessing.normalize(batch["image"])
    zimg, ztxt, _ = model(images, batch["tokens"], batch["mask"])
    bias = () if name == "softmax" else (model.logit_bias[...],)
    direct = getattr(losses, f"{name}_loss")(zimg, ztxt, model.logit_scale[...], *bias, text_ids=batch["text_id"])
    np.testing.assert_allclose(value, 8 * direct, rtol=1e-5)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    assert grads.keys() == others.keys()
    rounding = 4e-7 * max(np.abs(grad).max() for grad in grads.values())  # sums of float32 that cancel
    for path, grad in grads.items():
        atol = 1e-5 * np.abs(grad).max() + rounding
        np.testing.assert_allclose(others[path], grad, rtol=0, atol=atol, err_msg=path)
        assert np.abs(grad).max() > 0 or path == "text/layers/self_attn/k_proj/bias", path


def test_a_caption_that_two_pictures_share_is_no_negative(options):
    """With every caption the same, positives alone are left of the sigmoid loss."""
    task = task_of(options)
    model, batch = task.init(), batch_of(task)
    same = {name: jnp.broadcast_to(batch[name][:1], batch[name].shape) for name in ("tokens", "mask", "text_id")}
    value, _ = task.loss(model, batch | same, None)
    images = model.config.preprocessing.normalize(batch["image"])
    zimg, ztxt, _ = model(images, same["tokens"], same["mask"])
    positives = jax.nn.log_sigmoid(model.logits(zimg, ztxt)).diagonal()
    np.testing.assert_allclose(value, -positives.sum(), rtol=1e-5)


def test_a_locked_image_tower_stays_as_it_is(options, tmp_path):
    """LiT: nothing of it trains, the text tower does."""
    changed = options | {"trainable": "text.*|logit_.*", "optimizer.weight_decay_mask": ".*/kernel"}
    config = config_of(changed, CONFIG)
    before = params.flatten(Contrastive(config, sharding.make_mesh(config.mesh)).init())
    loop.fit(config, tmp_path / "run", "none")
    after = params.flatten(pg.load(tmp_path / "run", which="latest"))
    for path, array in before.items():
        locked = path.startswith(("vision/", "image_head/"))
        assert np.array_equal(array, after[path]) == locked, path


def test_another_models_tower_is_where_it_starts(options, run):
    """The tower goes in, the rest is new."""
    model, source = task_of(options, **{"init.vision": str(run), "seed": 3}).init(), pg.load(run)
    ours, theirs = params.flatten(model), params.flatten(source)
    for path in ours:
        if path.startswith("vision/"):
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert not np.array_equal(ours["text_projection/kernel"], theirs["text_projection/kernel"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"micro_batch": 4}, "micro_batch is 4, expected None: the loss is of all pairs"),
        ({"embed_micro_batch": 3}, "batch_size=8 does not divide into embeddings of 3 rows"),
        ({"model.variant": "b17"}, "model.variant: variant 'b17' is unknown"),
        ({"loss.name": "hinge"}, "loss.name is 'hinge', expected one of sigmoid, softmax"),
    ],
)
def test_what_is_refused(options, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        task_of(options, **changes)
