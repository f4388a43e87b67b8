"""`pg.load` of a run's workdir."""

import json

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.loading import is_run
from paligemma_jax.models.projection import projections
from tests.paligemma_jax.mini import config_of, task_of
from train_jax import loop
from train_jax.checkpoints.manager import Checkpoints
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


def saved(run, step):
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    arrays = checkpoints.restore_params(step)
    checkpoints.close()
    return arrays


@pytest.mark.parametrize("which", ["latest", 6, "6"])
def test_a_run_is_its_base_and_its_adapters(mini_run, mini_folder, which):
    arrays = param_tree.flatten(pg.load(mini_run, which=which))
    adapters, base = saved(mini_run, 12 if which == "latest" else 6), param_tree.flatten(pg.load(mini_folder))
    assert arrays.keys() == adapters.keys() | base.keys()
    for path, array in (base | adapters).items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=path)  # frozen leaves are the base's, bit for bit
    assert not np.array_equal(saved(mini_run, 6)[next(iter(adapters))], saved(mini_run, 12)[next(iter(adapters))])


def test_the_loaded_run_equals_the_evaluated_model(mini_run, mini_options):
    ours, theirs = pg.load(mini_run), loop.load_model(config_of(mini_options), mini_run)
    for path, array in param_tree.flatten(theirs).items():
        np.testing.assert_array_equal(param_tree.flatten(ours)[path], array, err_msg=path)
    for model in (ours, theirs):
        module = projections(model)["decoder/layers/self_attn/q_proj"]
        assert module.lora_scale == 32 / 8 and module.lora_dropout == 0.1


def test_a_run_loads_whatever_mesh_it_was_trained_on(mini_run, tmp_path):
    """A mesh that this machine does not have does not matter."""
    (tmp_path / "checkpoints").symlink_to(mini_run / "checkpoints")
    config = json.loads((mini_run / "config.json").read_text())
    config["mesh"]["data"] = config["batch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    result, expected = (param_tree.flatten(pg.load(path, which="latest")) for path in (tmp_path, mini_run))
    np.testing.assert_array_equal(
        result["decoder/layers/self_attn/q_proj/lora_b"], expected["decoder/layers/self_attn/q_proj/lora_b"]
    )


def test_dtype(mini_run):
    model = pg.load(mini_run, "bfloat16")
    arrays = param_tree.flatten(model)
    assert model.config.decoder.dtype == "bfloat16"
    assert arrays["decoder/embed_tokens/embedding"].dtype == "bfloat16"  # frozen
    assert arrays["decoder/layers/self_attn/q_proj/lora_a"].dtype == "float32"  # trained


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"which": "17"}, "checkpoint '17' not found"),
        ({"dtype": "int8"}, "config.compute_dtype='int8', expected one of float32, bfloat16, float16"),
        ({"image_size": 48}, "is a run, loaded with image_size, expected no such options"),
    ],
)
def test_options_that_a_run_lacks_are_refused(mini_run, options, sentence):
    with pytest.raises(UserError, match=sentence):
        pg.load(mini_run, **options)


def test_is_run(mini_run, mini_folder, tmp_path):
    assert is_run(mini_run) and is_run(str(mini_run))
    assert not is_run(mini_folder) and not is_run(tmp_path)


def test_a_moved_base_can_be_named(mini_run, mini_options, mini_folder, tmp_path):
    """The path of the base is not part of the model."""
    assert task_of(mini_options).default_split == "validation"
    moved = tmp_path / "moved"
    moved.symlink_to(mini_folder)
    loop.load_model(config_of(mini_options | {"model.path": str(moved)}), mini_run)
    with pytest.raises(UserError, match="adapter.alpha: 32.0 -> 16.0"):
        loop.load_model(config_of(mini_options | {"adapter.alpha": 16.0}), mini_run)
