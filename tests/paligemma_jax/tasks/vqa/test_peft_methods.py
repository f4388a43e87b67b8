"""Runs by other methods than LoRA: their keys, what they save, and that they are read again as they were."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import paligemma_jax as pg
from paligemma_jax.adapt.peft.diff_pruning import BETA, GAMMA, ZETA
from paligemma_jax.convert import convert
from paligemma_jax.models.projection import projections
from paligemma_jax.tasks.common import SHARDING_RULES
from paligemma_jax.tasks.vqa.adapter_config import PRESETS as CONFIGS
from tests.paligemma_jax.mini import mistake, task_of, train_main
from tests.paligemma_jax.training import SMOOTH, Training, long_answers
from tests.placed_model import placed_model
from train_jax.core import param_tree
from train_jax.parallel.sharding import make_mesh, shardings

pytestmark = pytest.mark.usefixtures("fast_compilation")
STEP = {"data.suffix_length": 8, "adapter.dropout": 0.0, "adapter.size": "None"}
SHORT = {"eval.controls": False, "total_steps": 2, "eval_steps": 2, "checkpoint_steps": 2, "log_steps": 1}
SIZES = {"last_layers": {"adapter.size": 1}}


def options(name: str) -> dict:
    """Of the config of a method, for the mini model."""
    return {key: value for key, value in (CONFIGS[name] | SIZES.get(name, {})).items() if key != "cache_features"}


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_paths_are_known_before_adapters_are_attached_and_nothing_else_changes(mini_options, name):
    training = Training(mini_options | SMOOTH | STEP | options(name) | {"cache_features": False}, long_answers())
    paths = training.task.trainable_paths()
    frozen = {path: np.array(leaf) for path, leaf in training.placed.frozen.items()}
    before = training.trained()
    assert sorted(before) == sorted(paths) and not set(paths) & set(frozen)
    training.run(2)
    assert any((array != before[path]).any() for path, array in training.trained().items())
    for path, leaf in training.placed.frozen.items():
        np.testing.assert_array_equal(leaf, frozen[path], err_msg=path)


@pytest.mark.parametrize("name", ["prompt", "last_layers", "diff_pruning"])
def test_a_run_is_saved_and_read_again(mini_options, tmp_path, name):
    workdir = tmp_path / "run"
    given = mini_options | SHORT | options(name) | {"cache_features": name == "prompt"}
    train_main(workdir, given)
    results = json.loads((workdir / "eval.json").read_text())
    assert math.isfinite(results["loss"]) and results["accuracy_before"] is not None
    model = pg.load(workdir)
    again = pg.load(given["model.path"], adapter=workdir / "adapter")
    images = jax.random.uniform(jax.random.key(0), (1, 24, 24, 3), minval=-1.0)
    tokens = jnp.arange(3, 9)[None]
    logits = [each(images, tokens, jnp.zeros_like(tokens))[0] for each in (model, again)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    task = task_of(given)
    trained = set(placed_model(task).trainable)
    held = {path for path in param_tree.flatten(model) if path in trained}
    assert held == trained and results["trainable_parameters"] == sum(
        param_tree.flatten(model)[path].size for path in held
    )


def test_the_untrained_model_is_the_base_without_a_new_adapter(mini_options, tmp_path):
    """A new prefix changes answers; what it is compared with has none."""
    scores = []
    for name in ("prefix", "bottleneck"):  # a new bottleneck changes nothing
        train_main(tmp_path / name, mini_options | SHORT | {"adapter.name": name, "eval_steps": 2})
        scores.append(json.loads((tmp_path / name / "eval.json").read_text())["accuracy_before_by_family"])
    assert scores[0] == scores[1]


def test_the_penalty_is_added_to_the_mean_loss(mini_options):
    losses = []
    for penalty in (0.0, 0.5):
        given = mini_options | SMOOTH | STEP | options("diff_pruning") | {"adapter.penalty": penalty}
        training = Training(given | {"cache_features": False}, long_answers())
        losses.append(training.run(1)[0]["loss"])
    share = 1 / (1 + math.exp(-2.0 + BETA * math.log(-GAMMA / ZETA)))  # of new gates, whose differences are zero
    assert losses[1] - losses[0] == pytest.approx(0.5 * share, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter.name": "prefx"}, "config.adapter.name='prefx', expected one of lora, bottleneck, prefix, prompt, "
         "bitfit, diff_pruning, last_layers, none: change it; did you mean 'prefix'?"),
        ({"adapter.name": "bitfit", "adapter.size": 4}, "adapter.size is 4 beside adapter.name='bitfit', which has "
         "none, expected one of bottleneck, prefix, prompt, last_layers: leave it out or change the name."),
        ({"adapter.name": "prefix", "adapter.size": 0}, "config.adapter.size=0, expected 1 or more: change it"),
        ({"adapter.name": "prefix", "adapter.targets": "decoder/.*"}, "adapter.targets is 'decoder/.*' beside "
         "adapter.name='prefix', which has none, expected one of lora, bitfit, diff_pruning: leave it out or "
         "change the name."),
        ({"adapter.penalty": 1.0}, "adapter.penalty is 1.0 beside adapter.name='lora', which has none, expected "
         "diff_pruning: leave it out or change the name."),
        ({"adapter.name": "last_layers", "adapter.size": 2}, "the last 2 layers are to train, expected 1 to 1 of the "
         "2: change the number."),
        ({"adapter.name": "last_layers", "model.quantize": "nf4"}, "the last layers are to train but the base is "
         "quantised, and quantised kernels have no gradient: load it without quantisation, or train adapters."),
        ({"adapter.name": "bitfit", "cache_features": True}, "cache_features is on but projector/linear/bias trains, "
         "which changes the image features with every step: set cache_features=False."),
    ],
)  # fmt: skip
def test_mistakes(mini_options, tmp_path, capsys, changes, sentence):
    assert mistake(capsys, mini_options | changes, tmp_path / "run") == sentence


@pytest.mark.parametrize("format", ["hugging_face", "orbax"])
def test_a_run_by_another_method_becomes_a_plain_model(mini_options, tmp_path, format):
    train_main(tmp_path / "run", mini_options | SHORT | options("last_layers") | {"eval.before": False})
    place = convert(str(tmp_path / "run"), str(tmp_path / "plain"), format)
    images = jax.random.uniform(jax.random.key(0), (1, 24, 24, 3), minval=-1.0)
    tokens = jnp.arange(3, 9)[None]
    logits = [pg.load(each)(images, tokens, jnp.zeros_like(tokens))[0] for each in (tmp_path / "run", place)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


def test_arrays_that_replace_kernels_are_sharded_like_them(mini_options):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    kernels = {
        path: leaf for path, leaf in param_tree.flatten(task_of(mini_options).base()).items() if "kernel" in path
    }
    expected = shardings(mesh, SHARDING_RULES, kernels)[0]
    gated = shardings(mesh, SHARDING_RULES, {f"{path}/difference": leaf for path, leaf in kernels.items()})[0]
    assert {path.removesuffix("/difference"): place for path, place in gated.items()} == expected
    last = {path.replace("decoder/layers", "decoder/last_layers"): path for path in kernels if "decoder/layers" in path}
    moved = shardings(mesh, SHARDING_RULES, {new: kernels[path] for new, path in last.items()})[0]
    assert {last[path]: place for path, place in moved.items()} == {path: expected[path] for path in last.values()}
    assert any(place.spec != PartitionSpec() for place in expected.values())


def test_factors_are_sharded_like_their_kernels(mini_options):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    adapted = pg.attach_lora(task_of(mini_options).base(), "decoder/.*_proj|projector/linear", 2, rngs=nnx.Rngs(0))
    places = shardings(mesh, SHARDING_RULES, param_tree.flatten(adapted))[0]
    modules = {path: module for path, module in projections(adapted).items() if hasattr(module, "lora_a")}
    assert {path.split("/")[0] for path in modules} == {"decoder", "projector"}
    for path, module in modules.items():
        kernel, a, b = (tuple(places[f"{path}/{name}"].spec) for name in ("kernel", "lora_a", "lora_b"))
        outputs = len(kernel) - len(module.out_shape)
        inputs = outputs - len(module.in_shape)
        assert a == (*kernel[:outputs], None)
        assert b == (*kernel[:inputs], None, *kernel[outputs:])
