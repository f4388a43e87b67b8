import errno
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train_jax.checkpoints.manager import Checkpoints
from train_jax.core.errors import UserError


def make_state(seed):
    """Returns parameters of several dtypes and an optimizer state with named tuples."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "decoder/layers/self_attn/q_proj/kernel": jax.random.normal(keys[0], (2, 8, 4)),
        "vision/layers.0/bias": jax.random.normal(keys[1], (8,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, moments = optimizer.update(params, optimizer.init(params), params)
    return params, {"optimizer": moments, "guard": jnp.int32(seed), "codes": jnp.arange(5, dtype=jnp.uint8)}


def assert_bitwise_equal(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert new.dtype == old.dtype
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def names(folder):
    """Returns the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def save(checkpoints, step, accuracy=None, seed=None, **meta):
    params, opt_state = make_state(step if seed is None else seed)
    metrics = None if accuracy is None else {"accuracy": accuracy}
    checkpoints.save(step, params, opt_state, {"step": step} | meta, metrics)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", best_metric="accuracy")
    yield opened
    opened.close()


def test_round_trip_is_bitwise_and_restores_named_tuples(checkpoints):
    params, opt_state = make_state(7)
    ema = jax.tree.map(lambda leaf: 2 * leaf, params)
    meta = {"step": 7, "config": {"lr": 1e-5, "rates": ("a", 2)}, "patience": None}
    checkpoints.save(7, params, opt_state, meta, {"accuracy": 0.5}, ema=ema)
    other_params, other_state = make_state(8)  # only its shapes and structure may be used
    restored = checkpoints.restore(7, other_params, other_state, abstract_ema=other_params)
    assert_bitwise_equal(restored.params, params)
    assert_bitwise_equal(restored.opt_state, opt_state)
    assert_bitwise_equal(restored.ema, ema)
    assert isinstance(restored.opt_state["optimizer"][1][0], optax.ScaleByAdamState)
    assert checkpoints.read_meta(7) == {"step": 7, "config": {"lr": 1e-5, "rates": ["a", 2]}, "patience": None}
    assert checkpoints.read_metrics(7) == {"accuracy": 0.5}


def test_abstract_targets_suffice(checkpoints):
    params, opt_state = make_state(1)
    save(checkpoints, 1)
    restored = checkpoints.restore(1, *jax.eval_shape(lambda: (params, opt_state)))
    assert_bitwise_equal(restored.params, params)
    assert_bitwise_equal(restored.opt_state, opt_state)


def test_parameters_load_alone_without_a_target(checkpoints):
    save(checkpoints, 3)
    loaded = checkpoints.restore_params(3)
    assert_bitwise_equal(loaded, make_state(3)[0])
    assert {type(leaf) for leaf in loaded.values()} == {np.ndarray}
    with pytest.raises(UserError, match="checkpoint 3 .* holds no 'ema'"):
        checkpoints.restore_params(3, item="ema")


def test_latest_and_best_are_kept(tmp_path):
    with_mode = {"max": [0.1, 0.9, 0.5, 0.9, 0.2], "min": [0.9, 0.1, 0.5, 0.1, 0.2]}
    for mode, accuracies in with_mode.items():
        checkpoints = Checkpoints(tmp_path / mode, "accuracy", mode)
        for step, accuracy in enumerate(accuracies, start=1):
            save(checkpoints, step, accuracy)
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 5]  # the earlier of the two best
        assert names(tmp_path / mode) == ["2", "5"]
        save(checkpoints, 6)  # not evaluated: replaces the latest, not the best
        save(checkpoints, 7, float("nan"))
        checkpoints.close()

        again = Checkpoints(tmp_path / mode, "accuracy", mode, read_only=True)
        assert (again.all_steps(), again.best_step(), again.latest_step()) == ([2, 7], 2, 7)
        assert (again.resolve("best"), again.resolve("latest"), again.resolve("7"), again.resolve(2)) == (2, 7, 7, 2)
        assert again.read_metrics(7) == {"accuracy": None}


def test_without_a_metric_only_the_latest_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (10, 20, 30):
        save(checkpoints, step, accuracy=0.5)
    checkpoints.wait()
    assert checkpoints.all_steps() == [30]
    assert checkpoints.best_step() is None
    with pytest.raises(UserError, match="'best' not found .*no step was saved with an evaluation; .* a step of 30"):
        checkpoints.resolve("best")
    with pytest.raises(UserError, match="'20' not found"):
        checkpoints.resolve("20")
    checkpoints.close()


def test_saving_a_step_again_replaces_only_its_json(checkpoints):
    save(checkpoints, 4, patience=0)
    assert checkpoints.best_step() is None
    save(checkpoints, 4, accuracy=0.25, seed=99, patience=1)
    assert_bitwise_equal(checkpoints.restore_params(4), make_state(4)[0])
    assert checkpoints.read_meta(4) == {"step": 4, "patience": 1}
    assert checkpoints.best_step() == 4
    save(checkpoints, 4, patience=2)  # a save without metrics keeps the metrics
    assert checkpoints.read_meta(4)["patience"] == 2
    assert checkpoints.read_metrics(4) == {"accuracy": 0.25}


def test_restores_onto_eight_devices_and_back(checkpoints):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    params, opt_state = make_state(1)
    save(checkpoints, 1)

    def spread(leaf):
        split_axis = next((axis for axis, size in enumerate(leaf.shape) if size % 4 == 0), None)
        spec = PartitionSpec() if split_axis is None else PartitionSpec(*[None] * split_axis, "fsdp")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    targets = jax.tree.map(spread, (params, opt_state))
    on_eight = checkpoints.restore(1, *targets)
    for leaf, target in zip(jax.tree.leaves(on_eight[:2]), jax.tree.leaves(targets), strict=True):
        assert leaf.sharding == target.sharding
    assert_bitwise_equal(on_eight[:2], (params, opt_state))

    checkpoints.save(2, on_eight.params, on_eight.opt_state, {})
    on_one = checkpoints.restore(2, params, opt_state)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(on_one[:2])} == {1}
    assert_bitwise_equal(on_one[:2], (params, opt_state))


def test_a_mismatch_lists_every_path(checkpoints):
    save(checkpoints, 1)
    params, opt_state = make_state(1)
    params["decoder/layers/self_attn/q_proj/kernel"] = jnp.zeros((2, 8, 5))
    params["vision/layers.0/bias"] = jnp.zeros(8)
    params["projector/kernel"] = jnp.zeros(3)
    del opt_state["guard"]
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, params, opt_state)
    sentence = str(error.value)
    for phrase in (
        "checkpoint 1 in ",
        "params: decoder/layers/self_attn/q_proj/kernel is float32[2, 8, 4] there and float32[2, 8, 5] here",
        "params: vision/layers.0/bias is bfloat16[8] there and float32[8] here",
        "params: projector/kernel is absent there and float32[3] here",
        "opt_state: guard is int32[] there and absent here",
    ):
        assert phrase in sentence
    assert "\n" not in sentence


def test_checkpoint_errors(tmp_path, checkpoints):
    with pytest.raises(UserError, match="no checkpoint in .*; train first"):
        checkpoints.resolve("latest")
    with pytest.raises(UserError, match="best_metric='accuracy' is not measured .*, expected one of loss, rouge1"):
        checkpoints.save(1, *make_state(1), {}, {"loss": 1.0, "rouge1": 0.1})
    with pytest.raises(UserError, match="which does not exist"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    with pytest.raises(UserError, match="best_mode is 'maximum'"):
        Checkpoints(tmp_path, best_mode="maximum")
    assert not (tmp_path / "nowhere").exists()


KILLED = """
import os, signal, sys
import numpy as np
from train_jax.checkpoints.manager import Checkpoints

checkpoints = Checkpoints(sys.argv[1], "accuracy")
small = {"kernel": np.arange(4.0, dtype=np.float32)}
checkpoints.save(1, small, {"count": np.int32(1)}, {"step": 1}, {"accuracy": 0.5})
checkpoints.wait()
# Random numbers do not compress, so the background write ends long after save returns.
large = {"kernel": np.random.default_rng(0).normal(size=2**25).astype(np.float32)}
checkpoints.save(2, large, {"count": np.int32(2)}, {"step": 2}, {"accuracy": 0.9})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_earlier_step(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, folder], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert any("tmp" in name for name in names(folder))  # the save had begun

    looking = Checkpoints(folder, "accuracy", read_only=True)
    assert looking.all_steps() == [1]
    assert any("tmp" in name for name in names(folder))  # a reader does not remove the save of a running process
    assert "read only" not in caplog.text
    looking.close()

    checkpoints = Checkpoints(folder, "accuracy")
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, 1)
    np.testing.assert_array_equal(checkpoints.restore_params(1)["kernel"], np.arange(4.0))
    save(checkpoints, 2, accuracy=0.9)
    assert_bitwise_equal(checkpoints.restore_params(2), make_state(2)[0])
    checkpoints.close()
    assert names(folder) == ["2"]


@pytest.mark.filterwarnings("ignore:coroutine")  # the one that "at once" cuts off
@pytest.mark.parametrize("where", ["background", "at once", "annotation"])
def test_a_full_disk_is_one_error_and_keeps_earlier_steps(tmp_path, monkeypatch, caplog, where):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, "accuracy")
    save(checkpoints, 1, accuracy=0.9)
    save(checkpoints, 2, accuracy=0.1)
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "background":

        async def full_later(*_, **__):
            full()

        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full_later)
    elif where == "at once":
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    step = 2 if where == "annotation" else 3
    with pytest.raises(UserError, match=f"no space for checkpoint {step} in .*checkpoints: it takes about .* MiB and "):
        save(checkpoints, step, accuracy=0.2)
        checkpoints.wait()
    assert not [record for record in caplog.records if record.exc_info]  # no traceback before the sentence
    assert checkpoints.all_steps() == [1, 2]
    assert_bitwise_equal(checkpoints.restore_params(2), make_state(2)[0])
    checkpoints.close()  # does not raise a second time

    monkeypatch.undo()  # the disk has space again
    checkpoints = Checkpoints(folder, "accuracy")
    assert checkpoints.all_steps() == [1, 2]
    save(checkpoints, 3, accuracy=0.2)
    checkpoints.close()
    assert names(folder) == ["1", "3"]
    assert json.loads((folder / "3/meta/meta.json").read_text())["metrics"] == {"accuracy": 0.2}
