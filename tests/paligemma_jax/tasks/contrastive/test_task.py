"""A dual encoder trained through the runtime: a run from end to end, its loss, what is locked and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax import convert, losses, zero_shot
from paligemma_jax.data.records import Record
from paligemma_jax.models.variants import variant
from paligemma_jax.tasks.contrastive import task as contrastive
from paligemma_jax.tasks.contrastive.pair_options import select_negatives
from paligemma_jax.tasks.contrastive.task import Contrastive
from paligemma_jax.weights.reader import stored_dtype
from tests.paligemma_jax.mini import ROOT, Rows, config_of, png
from train_jax import loop
from train_jax.config.base import from_json
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.plan.planning import plan

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


def test_a_run_writes_results_and_figures(run, options):
    results = json.loads((run / "eval.json").read_text())
    names = task_of(options).validation_metrics
    assert set(names) <= results.keys()
    assert all(0 <= results[name] <= 1 for name in names)
    assert 0 <= results["calibration_error"] <= 1
    for name in ("similarity", "neighbours", "calibration"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_loaded_as_a_model_with_its_tokenizer(run, options):
    model = pg.load(run)
    assert isinstance(model, pg.DualEncoder)
    trained = loop.load_model(from_json((run / "config.json").read_text()), run, "best")
    for path, array in param_tree.flatten(trained).items():
        np.testing.assert_array_equal(param_tree.flatten(model)[path], array, err_msg=path)
    tokenizer = pg.load_text_tokenizer(run, model.config.text.length)
    theirs = task_of(options).tokenizer
    for ours, expected in zip(tokenizer(["a red Cube"]), theirs(["a red Cube"]), strict=True):
        np.testing.assert_array_equal(ours, expected)


def _ids(batch):
    return {"text_ids": batch["text_id"], "image_ids": batch["image_id"]}


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_the_loss_of_all_pairs_does_not_depend_on_the_embedding_micro_batch(options, name):
    """Against the loss of the embeddings, and its gradient with micro-batches against that without."""
    tasks = [task_of(options, **{"loss.name": name, "embed_micro_batch": size}) for size in (None, 2)]
    graph, arrays = param_tree.split(tasks[0].init())
    batch = batch_of(tasks[0])

    def loss(task, arrays):
        return task.loss(param_tree.merge(graph, arrays), batch, None)[0]

    (value, grads), (again, others) = (jax.value_and_grad(lambda a, task=task: loss(task, a))(arrays) for task in tasks)
    model = tasks[0].init()
    images = model.config.preprocessing.normalize(batch["image"])
    zimg, ztxt, _ = model(images, batch["tokens"], batch["mask"])
    bias = () if name == "softmax" else (model.logit_bias[...],)
    direct = getattr(losses, f"{name}_loss")(zimg, ztxt, model.logit_scale[...], *bias, **_ids(batch))
    np.testing.assert_allclose(value, 8 * direct, rtol=1e-5)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    assert grads.keys() == others.keys()
    rounding = 4e-7 * max(np.abs(grad).max() for grad in grads.values())  # sums of float32 that cancel
    for path, grad in grads.items():
        atol = 1e-5 * np.abs(grad).max() + rounding
        np.testing.assert_allclose(others[path], grad, rtol=0, atol=atol, err_msg=path)
        assert np.abs(grad).max() > 0 or path.endswith("k_proj/bias"), path  # the softmax does not see it


def test_equal_captions_are_not_negatives(options):
    """With every caption the same, positives alone are left of the sigmoid loss."""
    task = task_of(options)
    model, batch = task.init(), batch_of(task)
    same = {name: jnp.broadcast_to(batch[name][:1], batch[name].shape) for name in ("tokens", "mask", "text_id")}
    value, _ = task.loss(model, batch | same, None)
    images = model.config.preprocessing.normalize(batch["image"])
    zimg, ztxt, _ = model(images, same["tokens"], same["mask"])
    positives = jax.nn.log_sigmoid(model.logits(zimg, ztxt)).diagonal()
    np.testing.assert_allclose(value, -positives.sum(), rtol=1e-5)


def test_a_locked_image_tower_does_not_change(options, tmp_path):
    """LiT: nothing of it trains, the text tower does."""
    changed = options | {"trainable": "text.*|logit_.*", "optimizer.weight_decay_mask": ".*/kernel"}
    config = config_of(changed, CONFIG)
    before = param_tree.flatten(Contrastive(config, sharding.make_mesh(config.mesh)).init())
    loop.fit(config, tmp_path / "run", "none")
    after = param_tree.flatten(pg.load(tmp_path / "run", which="latest"))
    for path, array in before.items():
        locked = path.startswith(("vision/", "image_head/"))
        assert np.array_equal(array, after[path]) == locked, path


def test_training_starts_from_the_tower_of_another_model(options, run):
    """The tower goes in, the rest is new."""
    model, source = task_of(options, **{"init.vision": str(run), "seed": 3}).init(), pg.load(run)
    ours, theirs = param_tree.flatten(model), param_tree.flatten(source)
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
        ({"loss.name": "hinge"}, "config.loss.name='hinge', expected one of sigmoid, softmax"),
        ({"loss.negatives": 8}, "loss.negatives is 8, expected 1 to 7, one fewer than the batch"),
        ({"loss.negatives": 2, "loss.name": "softmax"}, "loss.negatives leaves pairs out of the sigmoid loss"),
        ({"data.name": "jsonl"}, "data.name is 'jsonl' but data.source is not set"),
        ({"data.source": "x"}, "but data.name is 'scenes', which are rendered: set data.name to jsonl, tfds or"),
        ({"loss.full_matrix": True, "loss.negatives": 4}, "expected no loss.negatives and data.name=scenes with it"),
        ({"data.name": "jsonl", "data.source": "x", "data.num_tuning": 4}, "which is for data.name=scenes"),
        ({"data.noise": "colours"}, "config.data.noise='colours', expected one of '', images, texts, pairs"),
        ({"data.noise_share": 1.5}, "config.data.noise_share=1.5, expected a number from 0 to 1"),
        ({"model.variant": "siglip-b16-224"}, "tokenizer is not set, expected the one for texts of siglip-b16-224"),
    ],
)
def test_invalid_configs_are_refused(options, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        task_of(options, **changes)


@pytest.mark.parametrize(
    ("changes", "repair"),
    [({}, "leave --split out.$"), ({"data.name": "jsonl", "data.source": "x"}, "or name it by --config.data.valid")],
)
def test_other_splits_than_the_held_out_data_are_refused(options, tmp_path, changes, repair):
    """Another's results would be those of this one under its name."""
    task = task_of(options, **changes)
    assert task.default_split == "validation"
    with pytest.raises(UserError, match=f"split is 'train', expected 'validation', the held-out data: .*{repair}"):
        task.evaluate(task.abstract(), tmp_path, "train")


# Data of one's own.


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of captioned pictures: eight to train on, of which one cannot be read, and six held out."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number) if number != 5 else b"no picture")
    for name, numbers in (("train", range(8)), ("validation", range(6))):
        lines = [{"image": f"{number}.png", "caption": f"number {number}"} for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_captions_from_a_file_train(options, own, tmp_path):
    """A picture that cannot be read is counted, and in no sum; there is nothing to be classified."""
    changed = options | {"data.name": "jsonl", "data.source": str(own), "data.max_bad_fraction": 0.5}
    results = loop.fit(config_of(changed, CONFIG), tmp_path / "run", "none")
    assert {"image_to_text_r1", "text_to_image_r10", "calibration_error"} <= results.keys()
    assert not any(name.startswith("zero_shot") for name in results)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert next(line["good_rows"] for line in lines if "good_rows" in line) == pytest.approx(7 / 8)


def own_captions(data, split):
    """Opens the pairs of a module constant, as a user's own function may: it needs no `data.source`."""
    return Rows([Record(png(i), f"{i}.png", i, "", f"number {i} of {split}") for i in range(8)])


def test_captions_of_an_own_function(options):
    task = task_of(options, **{"data.name": f"{__name__}:own_captions"})
    assert (batch_of(task)["weight"] == 1).all()
    assert Contrastive.blueprint(task.config, task.mesh).example["weight"].shape == ()


def test_a_bad_row_adds_nothing(options, own):
    changed = {"data.name": "jsonl", "data.source": str(own)}
    task = task_of(options, **changed)
    batch, model = batch_of(task), task.init()
    loss = task.loss(model, batch, None)[0] / task.normalizer({"weight": batch["weight"][None]})
    good = np.flatnonzero(batch["weight"])
    assert len(good) == 7
    rest = {name: rows[good] for name, rows in batch.items()}
    np.testing.assert_allclose(loss, task.loss(model, rest, None)[0] / 7, rtol=1e-5)


# What is locked, what is left out, and where a run starts.

LOCKED = {"trainable": "(image_head|text).*|logit_.*", "cache_features": True}


def test_features_of_a_locked_tower_give_the_loss_of_its_pictures(options):
    """Also through the whole runtime: the pictures of a batch are not there, and evaluation sees them."""
    tasks = [task_of(options, **LOCKED | changed) for changed in ({}, {"cache_features": False})]
    model = tasks[0].init()
    first, second = (task.loss(model, batch_of(task), None)[0] for task in tasks)
    assert "image" not in batch_of(tasks[0])
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_a_run_with_features(options, tmp_path):
    results = loop.fit(config_of(options | LOCKED, CONFIG), tmp_path / "run", "none")
    assert 0 <= results["text_to_image_r1"] <= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainable": ".*"}, "cache_features is on but vision/.* trains"),
        ({"cache_features_mb": 0, "data.num_scenes": 500}, "cache_features needs .* MiB of host memory for 500"),
    ],
)
def test_features_that_change_or_do_not_fit_are_refused(options, changes, sentence, monkeypatch):
    task = task_of(options, **LOCKED | changes)
    scenes = task_of(options).data.train()
    monkeypatch.setattr(type(scenes), "num_images", 500)
    monkeypatch.setattr(task.data, "train", lambda: scenes)
    with pytest.raises(UserError, match=sentence):
        task.train_source()


@pytest.mark.parametrize("by", ["hard", "easy", "random"])
def test_selected_negatives(by):
    rng = np.random.default_rng(0)
    zimg, ztxt = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    mask = np.asarray(select_negatives(zimg, ztxt, 2, by, jax.random.split(jax.random.key(0), 6)))
    cosines = np.asarray(zimg @ ztxt.T)
    for row in range(6):
        assert mask[row, row] and mask[row].sum() == 3
        others = np.delete(np.arange(6), row)
        order = others[np.argsort(cosines[row, others])]
        if by != "random":
            assert set(np.flatnonzero(mask[row])) == {row, *(order[-2:] if by == "hard" else order[:2])}
    other = select_negatives(zimg, ztxt, 2, by, jax.random.split(jax.random.key(1), 6))
    assert np.array_equal(mask, other) == (by != "random")


def test_the_loss_uses_the_mask_of_selected_negatives(options):
    task = task_of(options, **{"loss.negatives": 3, "loss.negatives_by": "hard", "loss.mask_duplicates": False})
    model, batch = task.init(), batch_of(task)
    images = model.config.preprocessing.normalize(batch["image"])
    zimg, ztxt, _ = model(images, batch["tokens"], batch["mask"])
    mask = select_negatives(zimg, ztxt, 3, "hard", None)
    expected = losses.sigmoid_loss(zimg, ztxt, model.logit_scale[...], model.logit_bias[...], mask=mask)
    np.testing.assert_allclose(task.loss(model, batch, None)[0], 8 * expected, rtol=1e-5)


def test_without_a_bias(options):
    model = task_of(options, **{"init.bias": None}).init()
    assert model.logit_bias is None
    task = task_of(options, **{"init.bias": None})
    batch = batch_of(task)
    zero = task_of(options, **{"init.bias": 0.0})
    np.testing.assert_allclose(task.loss(model, batch, None)[0], zero.loss(zero.init(), batch, None)[0], rtol=1e-6)


def test_training_continues_from_a_model(options, run, tmp_path):
    """With its own sizes, words, scale and bias."""
    convert.convert(str(run), str(tmp_path / "folder"), "hugging_face")
    convert.convert(str(run), str(tmp_path / "half"), "hugging_face", "float16")
    assert [stored_dtype(tmp_path / name) for name in ("folder", "half")] == ["float32", "float16"]
    task = task_of(options, **{"model.path": str(tmp_path / "folder"), "init.scale": 3.0, "data.text_length": 5})
    theirs, ours = param_tree.flatten(pg.load(run)), param_tree.flatten(task.init())
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
    assert task.tokenizer.length == 24
    with pytest.raises(UserError, match="which has no bias for the sigmoid loss: set loss.name=softmax"):
        task_of(options, **{"model.path": "random:clip-b32-224"})


def test_the_plan_has_the_shapes_of_a_batch(options):
    for changes in ({}, LOCKED):
        task = task_of(options, **changes)
        blueprint = Contrastive.blueprint(task.config, task.mesh)
        row = task.train_source()[0]
        assert {name: (np.shape(array), array.dtype) for name, array in row.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in blueprint.example.items()
        }
        assert param_tree.abstract(blueprint.model).keys() == param_tree.flatten(task.init()).keys()
    planned = plan(config_of(options, CONFIG))
    assert [program.name for program in planned.programs] == ["training step", "evaluation: embeddings"]


def test_devices_exchange_blocks_of_texts_and_never_gather_embeddings(options):
    """The whole step: towers, pooling, ring, gradients."""
    (step, _) = plan(config_of(options | {"mesh.data": 4}, CONFIG)).programs
    assert "collective-permute" in step.collectives and "all-gather" not in step.collectives


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_the_textbook_form_is_the_same_loss(options, name):
    task = task_of(options, **{"loss.name": name, "data.views": 2})
    batch = batch_of(task)
    batch["text_id"] = batch["text_id"].at[3].set(batch["text_id"][1])  # two rows that are no negatives
    whole = task_of(options, **{"loss.name": name, "data.views": 2, "loss.full_matrix": True})
    graph, arrays = param_tree.split(task.init())

    def gradient(task):
        return jax.value_and_grad(lambda arrays: task.loss(param_tree.merge(graph, arrays), batch, None)[0])(arrays)

    (value, ours), (whole_value, theirs) = gradient(task), gradient(whole)
    np.testing.assert_allclose(value, whole_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 + 1e-5 * np.abs(b).max()), ours, theirs)


def test_the_textbook_form_holds_a_matrix_of_all_pairs(options):
    """In the very step that a run compiles, beside activations that are the same."""
    graph, arrays = param_tree.split(task_of(options).abstract())
    batch = {
        name: jax.ShapeDtypeStruct((1024, *rows.shape[1:]), rows.dtype)
        for name, rows in batch_of(task_of(options)).items()
    }

    def temporary(task):
        step = jax.jit(jax.grad(lambda arrays, batch: task.loss(param_tree.merge(graph, arrays), batch, None)[0]))
        return step.lower(arrays, batch).compile().memory_analysis().temp_size_in_bytes

    chunks, matrix = (temporary(task_of(options, **{"loss.full_matrix": full})) for full in (False, True))
    assert matrix - chunks > 4 * 1024 * (1024 - 256)


def test_metrics_have_the_cosines_of_a_batch(options):
    task = task_of(options)
    batch, model = batch_of(task), task.init()
    zimg, ztxt = (np.asarray(z) for z in zero_shot.embed_rows(model, batch))
    metrics = {name: float(total / count) for name, (total, count) in task.loss(model, batch, None)[1].items()}
    np.testing.assert_allclose(metrics["cosine_own"], np.diag(zimg @ ztxt.T).mean(), atol=1e-6)
    np.testing.assert_allclose(metrics["cosine_mean"], (zimg @ ztxt.T).mean(), atol=1e-6)


def test_tuning_scenes_are_separate(options, run, tmp_path):
    """The report has their recall, and the results of the held-out data do not change."""
    task = task_of(options, **{"data.num_tuning": 6})
    scenes = [
        {json.dumps(scene) for scene in rows.scenes}
        for rows in (task.data.train(), task.data.held_out(), task.data.tuning())
    ]
    assert len(set.union(*scenes)) == 8 + 6 + 6
    model = pg.load(run)
    results = task.evaluate(model, tmp_path)
    embedded, captions = (
        zero_shot.embed(model, task.data.tuning()),
        [task.data.tuning().text(row) for row in range(6)],
    )
    assert results.pop("tuning_mean_r1") == zero_shot.retrieval(*embedded[:2], captions)["mean_r1"]
    assert results.items() <= json.loads((run / "eval.json").read_text()).items()
