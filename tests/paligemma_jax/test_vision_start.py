"""The vision tower of a SigLIP within a PaliGemma: `with_vision`, `init.vision`, and runs of dual encoders."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.variants import variant
from paligemma_jax.models.vit import resample_positions
from paligemma_jax.vision_start import vision_config_of
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_orbax
from paligemma_jax.weights.fingerprint import check_digest, model_digest
from paligemma_jax.weights.reader import new
from tests.paligemma_jax.mini import MINI, task_of
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config import base as configs
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.task import Task

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def dual(make_random):
    """A SigLIP whose vision tower has the sizes of the mini PaliGemma's; read-only."""
    text = TextConfig(31, 6, 16, 1, 24, 2)
    config = pg.DualEncoderConfig(MINI.vision, text, MINI.vision.width, preprocessing=Preprocessing.siglip(24))
    return make_random(nnx.eval_shape(lambda: pg.DualEncoder(config, rngs=nnx.Rngs(0))), seed=3)


@pytest.fixture(scope="module")
def folder(dual, tmp_path_factory):
    place = tmp_path_factory.mktemp("dual") / "siglip"
    save_hugging_face(dual, place)
    return place


def tower_of(model):
    return {path: array for path, array in param_tree.flatten(model).items() if path.startswith("vision/")}


def assert_tower(model, expected):
    ours, theirs = tower_of(model), tower_of(expected)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)


def refused(sentence, function, *arguments):
    with pytest.raises(UserError, match=sentence):
        function(*arguments)


def test_from_every_format_and_nothing_else_changes(dual, folder, mini_folder, tmp_path):
    save_big_vision(dual, tmp_path / "x.npz")
    save_orbax(dual, tmp_path / "orbax")
    before = param_tree.flatten(pg.load(mini_folder))
    for path in (folder, tmp_path / "x.npz", f"{tmp_path}/x.npz:img", tmp_path / "orbax"):
        model = pg.with_vision(pg.load(mini_folder), path)
        assert_tower(model, dual)
        for name, array in param_tree.flatten(model).items():
            assert name.startswith("vision/") or np.array_equal(array, before[name]), name


def test_features_are_those_of_the_tower(dual, folder, mini_folder):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)), jnp.float32)
    model = pg.with_vision(pg.load(mini_folder), folder)
    np.testing.assert_allclose(model.vision(images)[0], dual.vision(images)[0], rtol=0, atol=1e-6)


def test_the_tiny_siglip_drops_into_the_tiny_paligemma(tmp_path, make_random):
    dual = make_random(nnx.eval_shape(lambda: pg.DualEncoder(variant("tiny"), rngs=nnx.Rngs(0))))
    save_orbax(dual, tmp_path / "dual")
    model = pg.with_vision(pg.load("tiny", "bfloat16", param_dtype="float32"), tmp_path / "dual")
    assert_tower(model, dual)
    assert model.config.vision.dtype == "bfloat16"


def test_positions_are_resampled_for_another_image_size(dual, folder, mini_folder):
    model = pg.with_vision(pg.load(mini_folder, image_size=36), folder)
    expected = resample_positions(np.asarray(dual.vision.position_embedding[...]), 3, "bicubic")
    np.testing.assert_array_equal(model.vision.position_embedding[...], expected)


def test_towers_that_do_not_match_are_refused(golden, mini_folder, folder):
    model = pg.load(mini_folder)
    refused(
        "has patch_size 8 instead of 12, .*, expected that of the model", pg.with_vision, model, golden / "hf_siglip"
    )
    refused("class_token True instead of False", pg.with_vision, model, golden / "hf_clip")
    refused("has no vision tower", pg.with_vision, model, f"{golden}/bigvision_paligemma/params.npz:llm")
    refused("no model at", pg.with_vision, model, "nowhere")
    refused("expected plain kernels", pg.with_vision, pg.quantize(model, "int8"), folder)


def test_a_config_starts_from_it_and_its_workdir_notes_it(dual, folder, mini_options, tmp_path):
    task = task_of(mini_options | {"init.vision": str(folder)})
    assert_tower(task.init(), dual)
    task.start(tmp_path)
    sources = [task.config.model.path, None]
    check_digest(tmp_path, *sources, folder)
    refused(
        "with the tower that was .* set init.vision to it", check_digest, tmp_path, *sources, task.config.model.path
    )
    refused(
        "init.vision is .* beside model.quantize",
        task_of,
        mini_options | {"init.vision": str(folder), "model.quantize": "int8"},
    )
    refused(
        "expected a PaliGemma: give one. A SigLIP's tower can be",
        task_of(mini_options | {"model.path": str(folder), "tokenizer": "tiny"}).init,
    )


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}


@pytest.fixture
def other_images(folder, tmp_path):
    """The SigLIP with another preprocessing."""
    place = shutil.copytree(folder, tmp_path / "other_images")
    file = place / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | IMAGENET))
    return place


def test_the_preprocessing_is_copied_with_the_tower(other_images, dual, mini_folder, tmp_path):
    model = pg.with_vision(pg.load(mini_folder, image_size=36), other_images)
    prepared = model.config.preprocessing
    assert (prepared.mean, prepared.std, prepared.method) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    assert (prepared.source, prepared.size) == ("transformers", 36)
    save_big_vision(dual, tmp_path / "x.npz")
    for path in (tmp_path / "x.npz", f"{tmp_path}/x.npz:img"):
        model = pg.with_vision(pg.load(mini_folder), path)
        assert model.config.preprocessing == Preprocessing.big_vision(24)


def test_tasks_prepare_images_as_the_tower_needs_them(other_images, mini_options):
    task = task_of(mini_options | {"init.vision": str(other_images)})
    model = task.base()
    assert model.config.preprocessing == task.processor.preprocessing
    assert task.processor.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_new_models_config_has_the_towers_preprocessing(other_images):
    for name in ("tiny", "random:siglip-tiny"):
        config = nnx.eval_shape(lambda name=name: new(name)).config
        result = vision_config_of(config, str(other_images)).preprocessing
        assert (result.mean, result.size) == ((0.485, 0.456, 0.406), 96)
        assert vision_config_of(config, None) == config


class Contrastive(Task):
    """The minimal task that `pg.load` of a workdir needs: `init` returns the DualEncoder itself."""

    @staticmethod
    def defaults():
        config = configs.ConfigDict()
        config.model = configs.ConfigDict({"path": ""})
        return config

    def init(self):
        return pg.load(self.config.model.path)

    def trainable(self):
        return r"text/.*|logit_.*"  # a locked image tower

    def sharding_rules(self):
        return ((r".*", ()),)

    def unused(self, *args):
        raise AssertionError("loading a model asks for no more of its task")

    train_source = normalizer = loss = validate = evaluate = unused


def test_the_workdir_of_a_contrastive_run_is_a_dual_encoder(dual, folder, mini_folder, tmp_path):
    config = configs.base_config(f"{__name__}:Contrastive")
    config.model.path, config.batch_size = str(folder), 1
    for duration in ("total", "log", "eval", "checkpoint"):
        config[f"{duration}_steps"] = 1
    (tmp_path / "config.json").write_text(configs.to_json(config))
    graph, arrays = param_tree.split(dual)
    trained = {path: array + 1 for path, array in arrays.items() if path.startswith(("text/", "logit_"))}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, trained, {"count": np.zeros(())}, {})
    checkpoints.close()
    model = pg.load(tmp_path)
    assert isinstance(model, pg.DualEncoder)
    for path, array in param_tree.flatten(model).items():
        np.testing.assert_array_equal(array, trained.get(path, arrays[path]), err_msg=path)
    assert_tower(pg.with_vision(pg.load(mini_folder), tmp_path), dual)
    assert model_digest(tmp_path) == model_digest(str(tmp_path)) != model_digest(folder)
