"""The adapter keys of a VQA run: what they make, going on from a folder, and the folder that a run leaves."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import paligemma_jax as pg
from paligemma_jax.adapt.lora.adapter import lora_projections
from paligemma_jax.tasks.vqa import figures as vqa_figures
from paligemma_jax.weights import load_peft, save_peft
from paligemma_jax.weights.fingerprint import FILE, check_digest
from paligemma_jax.weights.reader import load
from tests.paligemma_jax.mini import mistake, task_of, train_main
from tests.paligemma_jax.training import SMOOTH, Training, long_answers
from tests.placed_model import placed_model
from train_jax import loop
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
MANY = {
    "adapter.targets": r"decoder/.*/(q_proj|down_proj)|projector/linear",
    "adapter.rank": 3,
    "adapter.dora": True,
    "adapter.layers": "(1,)",
    "adapter.rank_pattern": "(('.*/down_proj', 2), ('.*', 5))",
    "adapter.alpha_pattern": "(('decoder/layers/1/self_attn/.*', 7.0),)",
    "cache_features": False,
}
STEP = {"cache_features": False, "data.suffix_length": 8, "adapter.dropout": 0.0}
SHORT = {"eval.controls": False, "eval.candidates": "", "total_steps": 2, "eval_steps": 2, "log_steps": 1}


def adapters(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in param_tree.flatten(model).items() if "/lora_" in path}


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path, strict=True)


def test_every_key_reaches_the_adapters(mini_options):
    model = task_of(mini_options | MANY).init()
    modules = lora_projections(model)
    assert list(modules) == ["decoder/layers/mlp/down_proj", "decoder/layers/self_attn/q_proj"]  # no layer 1 elsewhere
    down, q = modules.values()
    assert down.lora_spec.ranks == (0, 2) and q.lora_spec.ranks == (0, 5)
    assert down.scale.tolist() == [0.0, 16.0] and q.scale.tolist() == pytest.approx([0.0, 7 / 5])
    norms = np.linalg.norm(np.asarray(down.kernel[...])[1], axis=0)
    np.testing.assert_allclose(down.lora_magnitude[...], [np.zeros_like(norms), norms], rtol=1e-6)


@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_trained_paths_are_known_before_adapters_are_attached(mini_options, quantize):
    task = task_of(mini_options | MANY | {"model.quantize": quantize})
    paths = task.trainable_paths()
    assert paths == sorted(paths)
    assert {path.rpartition("/")[2] for path in paths} == {"lora_a", "lora_b", "lora_magnitude"}
    assert paths == sorted(placed_model(task).trainable)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dora_on_a_quantised_base_starts_at_its_norms_and_trains(mini_options, quantize):
    training = Training(mini_options | SMOOTH | MANY | STEP | {"model.quantize": quantize}, long_answers())
    before = training.trained()
    kernel = training.placed.model().decoder.layers.mlp.down_proj.kernel
    magnitude = before["decoder/layers/mlp/down_proj/lora_magnitude"]
    np.testing.assert_allclose(magnitude[1], np.linalg.norm(np.asarray(kernel.dequantize())[1], axis=0), rtol=1e-6)
    training.run(2)
    after = training.trained()
    assert all(np.isfinite(array).all() and (array[1] != before[path][1]).any() for path, array in after.items())
    assert all((array[0] == 0).all() for array in after.values())  # the layer left out


# From a folder, and to one.


@pytest.fixture(scope="module")
def folder(mini_options, tmp_path_factory):
    """A peft folder of adapters that do something, with ranks and layers of its own."""
    model = task_of(mini_options | MANY).init()
    rng = np.random.default_rng(3)
    used = {path: array for path, array in adapters(model).items() if not path.endswith(("scale", "lora_b"))}
    moved = {path: array + 0.1 * (array != 0) * rng.normal(size=array.shape) for path, array in used.items()}
    for path in {path for path in adapters(model) if path.endswith("lora_b")}:
        moved[path] = rng.normal(size=param_tree.flatten(model)[path].shape)
        moved[path][0] = 0  # the layer left out
    place = tmp_path_factory.mktemp("peft") / "adapter"
    save_peft(param_tree.assign(model, {path: jnp.asarray(array, jnp.float32) for path, array in moved.items()}), place)
    return place


def test_training_starts_from_the_adapters_of_a_folder(mini_options, mini_folder, folder):
    options = mini_options | SMOOTH | STEP | {"adapter.path": str(folder)}
    expected = adapters(load_peft(load(mini_folder), folder))
    training = Training(options, long_answers())
    start = training.trained()
    assert_same(start, {path: array for path, array in expected.items() if not path.endswith("scale")})
    assert training.task.trainable_paths() == sorted(start)
    training.run(1)
    changed = training.trained()
    assert all((changed[path] != start[path]).any() for path in start)
    assert task_of(options | {"adapter.dropout": 0.2}).init().decoder.layers.mlp.down_proj.lora_dropout == 0.2


def test_the_plan_takes_a_folder_too(mini_options, folder):
    task = task_of(mini_options | STEP | {"adapter.path": str(folder)})
    blueprint = type(task).blueprint(task.config, task.mesh)
    shapes = param_tree.abstract(blueprint.model)
    assert patterns.select(task.trainable(), shapes) == task.trainable_paths()


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than the steps."""
    monkeypatch.setattr(loop, "plot_curves", lambda *paths: None)
    monkeypatch.setattr(vqa_figures, "save_answer_sheet", lambda *args, **options: None)


def test_a_run_writes_its_adapters_for_peft(mini_run, mini_folder):
    written = json.loads((mini_run / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(mini_folder) and written["r"] == 8
    exported = load_peft(load(mini_folder), mini_run / "adapter")
    assert_same(adapters(exported), adapters(pg.load(mini_run)))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_continues_from_the_adapters_of_another(mini_options, mini_run, mini_folder, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(mini_run / "adapter", start)
    options = mini_options | SHORT | {"adapter.path": str(start), "optimizer.learning_rate": 0.0}
    train_main(tmp_path / "run", options)
    before = load_file(start / "adapter_model.safetensors")
    after = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert_same(after, before)  # the rate is 0
    recorded = json.loads((tmp_path / "run" / FILE).read_text())
    assert recorded["adapter"]["path"] == str(start)
    check_digest(tmp_path / "run", mini_folder, start)
    config = json.loads((start / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (start / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained from the adapters that were at .*start .*set adapter.path to it"):
        pg.load(tmp_path / "run")


def test_the_untrained_model_has_the_adapters_of_the_folder(mini_options, mini_folder, folder):
    task = task_of(mini_options | STEP | {"adapter.path": str(folder)})
    model = task.init()
    moved = param_tree.assign(model, {path: jnp.asarray(array) * 2 for path, array in adapters(model).items()})
    assert_same(adapters(task._initial_model(moved)), adapters(model))


# Mistakes, all of them before the model is read.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter.layers": "(0, 0)"}, r"adapter.layers is \(0, 0\), expected different numbers of layers, such"),
        ({"adapter.layers": "(-1,)"}, r"adapter.layers=\(-1,\), expected whole numbers of 0 or more"),
        ({"adapter.rank_pattern": "(('.*', 0),)"}, r"adapter.rank_pattern holds \('.\*', 0\), .* of 1 or"),
        ({"adapter.rank_pattern": "('.*', 4)"}, r"adapter.rank_pattern holds '.\*', expected pairs"),
        ({"adapter.alpha_pattern": "(('.*', 0.0),)"}, r"adapter.alpha_pattern holds .* a finite number above 0"),
        ({"adapter.alpha_pattern": "(('.*', 1e999),)"}, r"adapter.alpha_pattern holds .* a finite number above 0"),
        ({"adapter.alpha_pattern": "(('(', 2),)"}, r"'\(' is not a regular expression"),
        ({"adapter.name": "none", "adapter.dora": True}, "adapter.dora is True beside adapter.name='none'"),
        ({"adapter.path": "x", "adapter.rank": 4}, "adapter.rank is 4 beside adapter.path='x', whose files decide it"),
        ({"adapter.path": "nowhere"}, "nowhere holds no adapter_config.json, expected a folder that peft's"),
        ({"adapter.name": "none", "model.param_dtype": "float16"}, "param_dtype is float16 .* trains the weights"),
        ({"model.quantize_double": True}, "model.quantize_double is True beside model.quantize=''"),
        ({"model.quantize_block_size": 32}, "config.model.quantize_block_size=32, expected one of 64, 128"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_the_model_is_read(
    capsys, mini_options, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.setattr(
        "paligemma_jax.tasks.vqa.base_model.load", lambda *args, **options: pytest.fail("the model was read")
    )
    assert re.search(sentence, mistake(capsys, mini_options | changes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter.layers": "(7,)"}, r"lora layers are \[7\], expected some of 0 to 1"),
        ({"adapter.rank_pattern": "(('decoder/layers/9/.*', 4),)"}, "rank_pattern: 'decoder/layers/9/.*' matches none"),
        ({"adapter.path": "adapter_of_another_model"}, "does not fit this model"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused_before_data_are_prepared(
    capsys, mini_options, golden, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.setattr("paligemma_jax.tasks.vqa.task.VQA.split", lambda *args: pytest.fail("data were prepared"))
    if "adapter.path" in changes:
        changes = {"adapter.path": str(golden / "hf_peft_lora/adapter_seven")}
    assert re.search(sentence, mistake(capsys, mini_options | changes, tmp_path / "run"))
