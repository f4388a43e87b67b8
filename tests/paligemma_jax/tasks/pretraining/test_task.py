"""Packed texts, their mask, patch labels, and the way of a pretrained model into a folder."""

import inspect
import json
import warnings

import beartype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype.door import is_bearable
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.data.sources import pretraining_scenes
from paligemma_jax.data.sources.pretraining_scenes import PretrainingScenes, build, patch_labels
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.build import split_scene
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.models.attention import packed_mask
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.paligemma import DECODERS, variant
from paligemma_jax.tasks import export as export_module
from paligemma_jax.tasks.export import export
from paligemma_jax.tasks.pretraining import detection, scene_task
from paligemma_jax.tasks.pretraining import task as pretraining
from paligemma_jax.tasks.pretraining.task import Pretraining, pack
from paligemma_jax.tasks.pretraining.vision import Patches, VisionPretraining
from tests.paligemma_jax.mini import MINI, ROOT, config_of
from train_jax import loop
from train_jax.config.base import task_class
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.plan.planning import plan

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOKENIZER = load_tokenizer("tiny")
WEIGHTS = {"answer": 3.0, "caption": 0.5, "detect": 0.3, "point": 0.5, "describe": 1.0}
TEXTS = [("detect ball", "<loc0001>"), ("caption en", "a red"), ("answer en what", "2")]


def packed(texts=TEXTS, length=40):
    return pack(TOKENIZER, texts, length, WEIGHTS)


def test_rows_as_in_the_docstring():
    row = packed(TEXTS[:2])
    at = 0
    for number, (prefix, suffix) in enumerate(TEXTS[:2], start=1):
        head = [TOKENIZER.bos_id, *TOKENIZER.encode(prefix), *TOKENIZER.separator_ids]
        tail = TOKENIZER.encode(suffix)
        n, part = len(head) + len(tail), slice(at, at + len(head) + len(tail))
        assert row["tokens"][part].tolist() == head + tail
        assert row["targets"][part].tolist() == [*head[1:], *tail, TOKENIZER.eos_id]
        assert row["segment"][part].tolist() == [number] * n
        assert row["suffix"][part].tolist() == [0] * len(head) + [1] * len(tail)
        assert row["offset"][part].tolist() == list(range(n))
        supervised = [0] * (len(head) - 1) + [1] * (len(tail) + 1)
        np.testing.assert_allclose(row["weight"][part], WEIGHTS[prefix.split()[0]] * np.array(supervised))
        assert {pretraining.TASKS[kind] for kind in row["kind"][part]} == {prefix.split()[0]}
        at += n
    assert not any(values[at:].any() for values in row.values())
    assert {len(values) for values in row.values()} == {40}


def test_a_shorter_text_fills_the_room_that_a_longer_one_exceeds():
    first = int((packed(TEXTS[:1])["segment"] > 0).sum())
    last = int((packed(TEXTS[2:])["segment"] > 0).sum())
    row = packed([TEXTS[0], ("caption en", "a red cube and " * 10), TEXTS[2]], first + last)
    assert set(row["segment"].tolist()) == {1, 3}


def test_the_attention_mask_of_packed_texts():
    segment, suffix = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[0, 0, 1, 0, 1, 0]])
    expected = """
        11 000000
        11 000000
        11 110000
        11 110000
        11 111000
        11 000100
        11 000110
        11 000000
    """
    rows = [[int(c) for c in line.replace(" ", "")] for line in expected.split("\n") if line.strip()]
    np.testing.assert_array_equal(packed_mask(segment, suffix, 2)[0], np.array(rows, bool))


@pytest.fixture(scope="module")
def task():
    """The task with the small sizes of the mini model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_task, "variant", lambda name: MINI)
        settings = config_of({"init_from": "()"}, config=str(ROOT / "configs/pretrain.py"))
        return Pretraining(settings, sharding.make_mesh(settings.mesh))


@pytest.fixture(scope="module")
def module(task):
    return task.init()


def test_a_packed_text_reads_as_if_alone(task, module):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    rows = [packed(), *(packed([text]) for text in TEXTS)]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]} | {"image": jnp.stack([image] * 4)}
    hidden, _ = task.forward(module, batch)
    for number in (1, 2, 3):
        together, alone = rows[0]["segment"] == number, rows[number]["segment"] == 1
        np.testing.assert_allclose(hidden[0, together], hidden[number, alone], atol=2e-5)
    other = batch | {"image": 255 - batch["image"]}
    assert np.abs(task.forward(module, other)[0] - hidden)[0, :3].max() > 1e-3  # a text reads the image


def test_the_annotations_of_the_patch_heads_loss_are_not_deprecated(module):
    """beartype warns of those that a coming Python drops; and it takes the model's own heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beartype.beartype(inspect.unwrap(scene_task.patch_loss))
    assert is_bearable(module.patch_heads, inspect.get_annotations(scene_task.patch_loss)["heads"])


def test_scores_count_whole_suffixes(task, module, monkeypatch):
    """Against predictions made to be right, wrong in one token, and right."""
    row = packed()
    batch = {name: jnp.asarray(values)[None] for name, values in row.items()}
    batch["patches"] = jnp.zeros((1, 4, 4), jnp.int32)
    logits = np.eye(1792, dtype=np.float32)[row["targets"]]
    wrong = np.flatnonzero((row["segment"] == 2) & (row["weight"] > 0))[0]
    logits[wrong] = np.eye(1792)[5]
    monkeypatch.setattr(Gemma, "logits", lambda self, hidden: jnp.asarray(logits)[None])
    monkeypatch.setattr(task, "forward", lambda *args: (None, jnp.zeros((1, 4, 16))))
    scores = task._score(module, batch)
    assert {name: tuple(map(float, scores[f"{name}_accuracy"])) for name in pretraining.TASKS} == {
        "detect": (1, 1),
        "caption": (0, 1),
        "answer": (1, 1),
        "point": (0, 0),
        "describe": (0, 0),
    }


def test_an_evaluation_is_compiled_once(task, module, monkeypatch, scenes):
    """However often a run evaluates."""
    monkeypatch.setattr(scene_task.SceneTask, "rendered", lambda self, stream, number: scenes)
    vision = VisionPretraining(task.config, task.mesh)
    vision.config, vision.model_config = task.config, MINI
    traced = []
    for counted, name in ((task, "_score"), (vision, "loss")):
        original = getattr(counted, name)
        monkeypatch.setattr(counted, name, lambda *given, f=original, n=name: (traced.append(n), f(*given))[1])
    for _ in range(2):
        task.validate(module), vision.validate(module)
    assert sorted(traced) == ["_score", "loss"]


def test_detection_scores(module, monkeypatch):
    """Answers made to be exact; to have one box of two, shifted by a quarter; and to hold no box at all."""
    texts = [
        ("detect object", "<loc0000><loc0000><loc0400><loc0400> red cube ; <loc0500><loc0500><loc0900><loc0900> ball")
    ]
    images = [np.zeros((24, 24, 3), np.uint8)]
    scores_by_answer = {
        texts[0][1]: (1.0, 1.0),
        "<loc0000><loc0100><loc0400><loc0500> red cube": (0.6 / 2, 0.5),
        "<loc0000><loc0000><loc0400><loc0400> blue cube": (0.0, 0.0),
        "a red cube": (0.0, 0.0),
    }
    calls = []

    def generate(*given):
        calls.append(given)
        ids = [*TOKENIZER.encode(list(scores_by_answer)[len(calls) - 1]), TOKENIZER.eos_id]
        return np.tile(np.array(ids), (20, 1))

    monkeypatch.setattr(detection, "generate", generate)
    for iou, recall in scores_by_answer.values():
        scores = detection.detection_scores(module.model, TOKENIZER, images, texts)
        assert scores == pytest.approx({"detect_mean_iou": iou, "detect_recall_50": recall})
    model, pixels, tokens, mask, room, eos = calls[0]
    assert pixels.shape == (20, 24, 24, 3) and room == len(TOKENIZER.encode(texts[0][1])) + 1
    assert tokens[0].tolist() == [TOKENIZER.bos_id, *TOKENIZER.encode("detect object"), *TOKENIZER.separator_ids]


def test_every_image_is_compared_with_its_own_boxes(module, monkeypatch):
    """23 pictures, answered 20 at a time: each is answered with its own box, but for the last."""
    texts = [("detect object", f"<loc0000><loc0000><loc0500><loc{100 + 10 * n:04d}> cube") for n in range(23)]
    ids = np.array([TOKENIZER.encode(suffix) for _, suffix in texts])
    batches = iter([ids[:20], np.concatenate([ids[20:22], ids[:1], ids[:17]])])
    monkeypatch.setattr(detection, "generate", lambda *given: next(batches))
    scores = detection.detection_scores(module.model, TOKENIZER, [np.zeros((24, 24, 3), np.uint8)] * 23, texts)
    assert scores == pytest.approx({"detect_mean_iou": (22 + 100 / 320) / 23, "detect_recall_50": 22 / 23})


# Scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pretraining") / "scenes", 3, 24, 2)


@pytest.mark.parametrize("argument", ["", ":vision"])
def test_the_plan_has_the_shapes_of_the_training_rows(scenes, monkeypatch, argument):
    monkeypatch.setattr(scene_task, "variant", lambda name: MINI)
    monkeypatch.setattr(scene_task.SceneTask, "rendered", lambda self, stream, number: scenes)
    config = config_of({"init_from": "()", "mesh.data": 1}, config=str(ROOT / "configs/pretrain.py") + argument)
    blueprint = task_class(config.task).blueprint(config, sharding.make_mesh(config.mesh))
    row = blueprint.task.train_source()[0]
    assert {name: (np.shape(array), array.dtype) for name, array in row.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in blueprint.example.items()
    }
    assert [program.name for program in plan(config).programs] == ["training step"]


def test_rows_are_a_function_of_their_index(scenes, tmp_path):
    source, again = PretrainingScenes(scenes, 4, 5), PretrainingScenes(build(tmp_path / "b", 3, 24, 2), 4, 5)
    assert len(source) == 12
    for index in (0, 7, 11):
        for one, other in zip(source.read(index), again.read(index), strict=True):
            np.testing.assert_array_equal(one, other)
    first, view = source.read(1), source.read(4)  # two views of a scene: same picture, other texts
    np.testing.assert_array_equal(first[0], view[0])
    assert first[2] != view[2] and len(view[2]) == 5
    assert not np.array_equal(first[0], source.read(2)[0])


def test_streams_share_no_scene(tmp_path):
    one, other = (split_scene(0, stream, 0, (1, 10)) for stream in ("pretraining", "pretraining-held-out"))
    assert one["objects"] != other["objects"]


def test_an_interrupted_build_starts_again(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x", 3, 24, 2, progress=interrupt)
    assert not (tmp_path / "x/scenes.jsonl").exists()
    assert len((build(tmp_path / "x", 3, 24, 2) / "scenes.jsonl").read_text().splitlines()) == 3


def test_patch_labels(monkeypatch):
    """Patches of 4 x 4 pixels: nothing, a corner of one object, two objects, the ground."""
    objects = [
        {"shape": "cube", "color": "red", "size": "large", "material": "metal"},
        {"shape": "sphere", "color": "blue", "size": "small", "material": "rubber"},
    ]
    ids = np.full((8, 8), -1)
    ids[0, 4:6] = 0  # 2 of 16 pixels: enough
    ids[4:6, 0:4] = 0  # 8 pixels
    ids[6:8, 0:2] = 1  # 4 pixels
    ids[4, 4] = 1  # 1 of 16: too few
    monkeypatch.setattr(pretraining_scenes, "cast", lambda scene, width, height: (ids, None, None))
    labels = patch_labels({"objects": objects}, 8, 2)
    red = [values.index(objects[0][name]) + 1 for name, values in ATTRIBUTES.items()]
    assert labels.tolist() == [[0] * 4, red, red, [0] * 4]


def test_every_second_view_is_mirrored(scenes):
    patches = Patches(PretrainingScenes(scenes, 2, 0), num_scenes=3)
    plain, mirrored = patches[1], patches[4]
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    np.testing.assert_array_equal(mirrored["patches"], plain["patches"][[1, 0, 3, 2]])
    assert len({tuple(row) for row in plain["patches"].tolist()}) > 1


def test_micro_batches_are_refused():
    config = config_of({"micro_batch": 2, "batch_size": 4}, config=str(ROOT / "configs/pretrain.py:vision"))
    with pytest.raises(UserError, match="micro_batch is 2, expected None"):
        VisionPretraining(config, None)


@pytest.mark.parametrize("argument", ["", ":vision"])
def test_a_variant_of_a_released_model_is_trained_on_images_prepared_for_it(argument):
    changes = {"model.variant": "3b-224", "model.unroll": False, "batch_size": 2, "init_from": "()"}
    config = config_of(changes, config=str(ROOT / f"configs/pretrain.py{argument}"))
    task = task_class(config.task)(config, sharding.make_mesh(config.mesh))
    row = task.blank_row()
    assert row["image"].shape == (224, 224, 3) and task.model_config.preprocessing.size == 224
    np.testing.assert_allclose(task.normalize(jnp.array([0, 255, 0], jnp.uint8)), [-1, 1, -1])
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), row)
    loss, _ = nnx.eval_shape(lambda batch: task.loss(task.new(), batch, None), batch)
    assert loss.shape == ()


def test_every_variant_knows_how_its_images_are_prepared():
    for name in ("tiny", *(f"{size}-{pixels}" for size in DECODERS for pixels in (224, 448, 896))):
        sizes = variant(name)
        assert sizes.preprocessing.size == sizes.vision.image_size


def test_an_unknown_remat_is_refused():
    config = config_of({"model.remat": "blocks"}, config=str(ROOT / "configs/pretrain.py:vision"))
    with pytest.raises(UserError) as error:
        VisionPretraining(config, None)
    assert (
        str(error.value)
        == "config.model.remat='blocks', expected one of none, block, dots, mlp, auto: change it; did you mean 'block'?"
    )


def test_trained_paths_are_known_before_scenes_are_rendered(task, module):
    assert set(task.trainable_paths()) == param_tree.flatten(module).keys()


# Export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on mini sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_task, "variant", lambda name: MINI)
        folder = tmp_path_factory.mktemp("pretrain")
        options = {
            "data.cache_dir": str(folder / "cache"),
            "data.num_scenes": 4,
            "data.num_held_out": 3,
            "data.build_workers": 1,
            "data.text_length": 32,
            "data.num_segments": 3,
            "data.threads": 0,
            "batch_size": 2,
            "total_steps": 3,
            "checkpoint_steps": 3,
            "eval_steps": 3,
            "mesh.data": 1,
            "optimizer.warmup_steps": 1,
            "optimizer.rates": "()",
            "init_from": "()",
        }
        loop.fit(config_of(options, config=str(ROOT / "configs/pretrain.py")), folder / "run", "none")
        yield folder / "run"


def test_a_pretraining_run_becomes_a_folder(run, tmp_path):
    results = json.loads((run / "eval.json").read_text())
    assert {f"{name}_accuracy" for name in pretraining.TASKS} <= results.keys()
    assert 0 <= results["detect_recall_50"] <= 1 and 0 <= results["detect_mean_iou"] <= 1
    export(run, tmp_path / "model")
    model = pg.load(tmp_path / "model")
    trained = param_tree.flatten(loop.load_model(config_of_run(run), run, "latest").model)
    loaded = param_tree.flatten(model)
    assert loaded.keys() == trained.keys()
    for path, array in trained.items():
        np.testing.assert_allclose(loaded[path], array, rtol=1e-3, atol=1e-6, err_msg=path)
    assert model.config.preprocessing == MINI.preprocessing
    assert pg.load_tokenizer(tmp_path / "model").encode("red") == TOKENIZER.encode("red")


def config_of_run(run):
    return export_module.config.from_json((run / "config.json").read_text())


def test_other_runs_are_not_exported(run, tmp_path, mini_run):
    with pytest.raises(UserError, match="has no config.json, expected the workdir of configs/pretrain.py"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is a run of paligemma_jax.tasks.vqa:VQA"):
        export(mini_run, tmp_path / "out")
    with pytest.raises(UserError, match="checkpoint '7' not found"):
        export(run, tmp_path / "out", "7")
    with pytest.raises(UserError, match="expected RUN FOLDER"):
        export_module.main(["export"])
