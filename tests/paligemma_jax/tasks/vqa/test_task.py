"""The loss of the VQA task, its weights, and what it trains."""

import gc
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from paligemma_jax.data.prompts import make_example
from paligemma_jax.tasks.vqa import base_model
from paligemma_jax.tasks.vqa.features import batch_features
from paligemma_jax.tasks.vqa.task import VQA
from paligemma_jax.weights import reader as load_module
from tests.paligemma_jax.mini import config_of, task_of
from tests.placed_model import placed_model
from train_jax import loop
from train_jax.config.resume_check import check_resume
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.task import Task

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def task(mini_options):
    return task_of(mini_options | {"cache_features": False, "adapter.dropout": 0.0})


@pytest.fixture(scope="module")
def model(task):
    """Adapters moved off zero, so that gradients reach both halves."""
    model = task.init()
    rng = np.random.default_rng(1)
    arrays = param_tree.flatten(model)
    moved = {
        path: jnp.asarray(rng.normal(size=a.shape), jnp.float32)
        for path, a in arrays.items()
        if path.endswith("lora_b")
    }
    return param_tree.assign(model, moved)


@pytest.fixture(scope="module")
def batch(task, mini_rows):
    rows = [
        task.processor.image(record) | task.processor.text(record) | {"weight": np.float32(1)}
        for record in mini_rows.records[:4]
    ]
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def gradient(task, model, batch):
    """Mean loss and its gradient by path, adapters alone."""
    graph, arrays = param_tree.split(model)
    trained = {path: a for path, a in arrays.items() if "/lora_" in path}
    frozen = {path: a for path, a in arrays.items() if path not in trained}

    def loss(trained):
        return task.loss(param_tree.merge(graph, trained | frozen), batch, None)[0] / task.normalizer(batch)

    return jax.jit(jax.value_and_grad(loss))(trained)


def assert_same(result, expected, rtol=1e-4):
    np.testing.assert_allclose(result[0], expected[0], rtol=rtol)
    for path, array in expected[1].items():
        np.testing.assert_allclose(result[1][path], array, rtol=rtol, atol=1e-4, err_msg=path)


def test_it_is_a_task(task):
    assert isinstance(task, Task)


def test_the_loss_is_the_mean_over_answer_and_eos(task, model, batch):
    logits, _ = nnx.jit(lambda model, *inputs: model(*inputs))(
        model,
        model.config.preprocessing.normalize(batch["image"]),
        batch["tokens"][:, :-1],
        batch["mask_ar"][:, :-1],
        batch["mask_input"][:, :-1],
    )
    log_probs = jax.nn.log_softmax(logits)
    total, count = 0.0, 0
    for row in range(4):
        for t in range(batch["tokens"].shape[1] - 1):
            if batch["mask_loss"][row, t + 1]:
                total, count = total - float(log_probs[row, t, batch["tokens"][row, t + 1]]), count + 1
    assert count == 8  # one token and EOS a row
    np.testing.assert_allclose(gradient(task, model, batch)[0], total / count, rtol=1e-4)


def test_features_in_the_batch_give_the_same_gradient(task, model, batch):
    features = batch_features(model, batch)
    cached = {name: value for name, value in batch.items() if name != "image"} | {"features": features}
    assert_same(gradient(task, model, cached), gradient(task, model, batch))


@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_rows_of_weight_zero_contribute_nothing(mini_options, model, batch, reduction):
    task = task_of(mini_options | {"cache_features": False, "loss.reduction": reduction, "adapter.dropout": 0.0})
    off = batch | {"weight": jnp.array([1.0, 0.0, 1.0, 0.0])}
    rest = {name: value[jnp.array([0, 2])] for name, value in batch.items()}
    assert_same(gradient(task, model, off), gradient(task, model, rest))
    assert task.normalizer(off) == (4 if reduction == "token_mean" else 2)
    assert task.normalizer(batch | {"weight": jnp.zeros(4)}) == 0


def test_reductions_weigh_long_answers_differently(mini_options, task, model, batch, mini_rows):
    texts = [("p", "red cube small"), ("p", "red")]
    tokenizer, data = task.tokenizer, task.config.data
    rows = [make_example(tokenizer, p, s, data.prefix_length + data.suffix_length) for p, s in texts]
    two = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    two |= {"image": batch["image"][:2], "weight": jnp.ones(2)}
    nll, tokens = jax.jit(task.token_loss)(model, two)
    assert tokens.tolist() == [len(tokenizer.encode("red cube small")) + 1, 2.0]
    by_example = task_of(mini_options | {"cache_features": False, "loss.reduction": "example_mean"})
    np.testing.assert_allclose(gradient(task, model, two)[0], nll.sum() / tokens.sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient(by_example, model, two)[0], (nll / tokens).mean(), rtol=1e-4)
    accumulated = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), two)
    assert task.normalizer(accumulated) == tokens.sum() and by_example.normalizer(accumulated) == 2


def test_padding_changes_nothing(task, model, batch):
    longer = dict(batch)
    for name in ("tokens", "mask_ar", "mask_input", "mask_loss"):
        longer[name] = jnp.pad(batch[name], ((0, 0), (0, 5)))
    assert_same(gradient(task, model, longer), gradient(task, model, batch))


def test_token_ids_of_padding_change_nothing(task, model, batch):
    noise = jnp.where(batch["mask_input"], batch["tokens"], 77)
    assert_same(gradient(task, model, batch | {"tokens": noise}), gradient(task, model, batch))


def test_prompts_are_the_beginning_of_training_rows(task, mini_rows):
    for record in mini_rows.records[:3]:
        prompt, row = task.processor.prompt(record), task.processor.text(record)
        length = int(prompt["mask_input"].sum())
        assert prompt["tokens"][:length].tolist() == row["tokens"][:length].tolist()
        assert not row["mask_loss"][:length].any() and row["mask_loss"][length]


@pytest.fixture
def reads(monkeypatch):
    """The paths that weights are read from."""
    paths, real = [], base_model.load

    def load(path, *args, **options):
        paths.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(base_model, "load", load)
    gc.collect()  # what earlier tests left is not alive
    return paths


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_base_is_read_once_and_does_not_depend_on_the_order_of_calls(own_base, reads, adapter):
    """Nothing keeps a second copy of weights that train."""
    task = task_of(own_base | {"adapter.name": adapter})
    source = task.train_source()
    assert task.processor and task.trainable_paths() and not reads  # shapes do
    arrays = param_tree.flatten(task.init())
    assert len(reads) == 1 and source[0]["image"].shape == (24, 24, 3)
    base = task.base()
    assert len(reads) == (1 if adapter == "lora" else 2)
    for path, array in param_tree.flatten(base).items():
        assert (array is arrays[path]) == (adapter == "lora"), path
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)


@pytest.mark.parametrize("changes", [{}, {"model.quantize": "nf4"}, {"adapter.name": "none"}, {"model.image_size": 48}])
def test_shapes_are_those_of_the_base(mini_options, changes):
    task = task_of(mini_options | {"cache_features": False} | changes)
    for shapes, model in ((task.shapes, task.base()), (task.initial_shapes(), task.init())):
        assert param_tree.split(shapes)[0] == param_tree.split(model)[0]
        assert param_tree.abstract(shapes) == param_tree.abstract(model)


@pytest.fixture
def own_base(mini_folder, mini_options, tmp_path):
    """Options of a base that no other test holds."""
    shutil.copytree(mini_folder, tmp_path / "base")
    return mini_options | {"model.path": str(tmp_path / "base"), "cache_features": False}


def test_a_control_run_shares_the_arrays_of_the_run(own_base, reads):
    task = task_of(own_base)
    placed = placed_model(task)
    control = VQA(task.control_runs()["question_only"], task.mesh)
    base = param_tree.flatten(control.base())
    assert len(reads) == 1 and base.keys() == placed.frozen.keys()
    assert all(array is placed.frozen[path] for path, array in base.items())
    other = placed_model(control)
    assert all(array is placed.frozen[path] for path, array in other.frozen.items())
    assert not any(array is placed.trainable[path] for path, array in other.trainable.items())
    assert len(reads) == 1


def test_a_base_is_shared_while_it_is_alive_and_equal(own_base, reads):
    first = task_of(own_base).base()
    task_of(own_base | {"model.remat": "block"}).base()  # compiled otherwise: the structure differs
    task_of(own_base | {"adapter.name": "none"}).base()  # will be donated
    assert len(reads) == 3
    first = task_of(own_base).base()
    file = Path(own_base["model.path"]) / "model.safetensors"
    weights = dict(load_file(file))
    weights["multi_modal_projector.linear.bias"] = weights["multi_modal_projector.linear.bias"] + 1
    save_file(weights, file)
    second = task_of(own_base).base()
    assert len(reads) == 5
    np.testing.assert_allclose(second.projector.linear.bias[...], first.projector.linear.bias[...] + 1, rtol=1e-6)
    del first, second
    gc.collect()
    task_of(own_base).base()
    assert len(reads) == 6


def test_keys_that_change_the_best_checkpoint_are_not_resume_safe(mini_options):
    """Validation generates answers: their length matters, how many at once does not."""
    old = config_of(mini_options)
    free = {"eval.batch_size": 3, "eval.max_examples": 2, "eval.candidates": "", "eval.feature_cache_mb": 1}
    free |= {
        "eval.controls": False,
        "eval.question_only": False,
        "eval.before": False,
        "eval.captions": 1,
        "cache_features_mb": 100,
    }
    assert len(check_resume(old, config_of(mini_options | free))) == len(free)
    assert set(free) >= {f"eval.{key}" for key in old.eval} - {"eval.max_new_tokens", "eval.int8_outliers"}
    with pytest.raises(UserError, match="eval.max_new_tokens: 4 -> 1"):
        check_resume(old, config_of(mini_options | {"eval.max_new_tokens": 1}))
    with pytest.raises(UserError, match="eval.int8_outliers: None -> 6.0"):
        check_resume(old, config_of(mini_options | {"eval.int8_outliers": 6.0}))


def test_validate_returns_the_validation_metrics(task, model, mini_rows, monkeypatch):
    monkeypatch.setattr(VQA, "split", lambda task, name: mini_rows)
    assert tuple(task.validate(model)) == VQA.validation_metrics


def test_the_question_only_control_run(mini_options, task):
    (name, config), *others = task.control_runs().items()
    assert name == "question_only" and not others
    assert config.data.blank_images and not config.eval.controls and not config.eval.before
    assert not task.config.data.blank_images
    assert VQA(config, task.mesh).control_runs() == {}
    for key in ("eval.controls", "eval.question_only"):
        assert task_of(mini_options | {key: False}).control_runs() == {}


def test_weights_go_straight_into_their_shardings(mini_options, monkeypatch):
    """No leaf lies whole on one device on its way."""
    placed, real = [], load_module.placed
    monkeypatch.setattr(load_module, "placed", lambda array, place: placed.append(place) or real(array, place))
    task = task_of(mini_options | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "adapter.name": "none"})
    arrays = param_tree.flatten(task.base())
    expected, _ = sharding.shardings(task.mesh, task.sharding_rules(), arrays)
    assert {path: array.sharding for path, array in arrays.items()} == expected
    assert len(placed) == len(arrays) and set(placed) == set(expected.values())
    assert any(not place.is_fully_replicated for place in placed)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.targets": r".*/(q_proj|linear)"},
        {"adapter.name": "none", "trainable": "decoder/.*/mlp/.*"},
    ],
)
def test_trained_paths_are_known_before_the_model_is_built(mini_options, changes):
    task = task_of(mini_options | changes | {"cache_features": False})
    paths = task.trainable_paths()
    assert sorted(paths) == sorted(placed_model(task).trainable)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"rates": "(('vision/.*', 0.5),)"}, "rule: 'vision/.*' matches none of 4 paths"),
        ({"weight_decay_mask": ".*/kernel"}, "weight_decay_mask of weight_decay=0.01: '.*/kernel' matches none of 4"),
    ],
)
def test_optimizer_patterns_are_checked_before_scenes_are_rendered(
    mini_options, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.setattr(VQA, "split", lambda *args: pytest.fail("data were prepared"))
    options = mini_options | {f"optimizer.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=re.escape(sentence)):
        loop.fit(config_of(options), tmp_path / "run", "none")


def test_a_projector_that_trains_cannot_be_cached(mini_options):
    changes = {"adapter.name": "none", "trainable": "projector/.*"}
    with pytest.raises(UserError, match="cache_features is on but projector/linear/.* trains"):
        task_of(mini_options | changes).train_source()
    task_of(mini_options | changes | {"cache_features": False}).train_source()
