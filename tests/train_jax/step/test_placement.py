"""Shardings of parameters and optimizer state; the result of training does not depend on the mesh."""

import math

import jax
import numpy as np
import pytest

from tests.placed_model import placed_model
from tests.train_jax.runs import assert_same_run
from tests.train_jax.toy_task import toy_config
from train_jax import loop
from train_jax.config.base import task_class
from train_jax.core.errors import UserError
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import placement

pytestmark = pytest.mark.usefixtures("fast_runs")
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
RUN = {"total_steps": 4, "model__width": 16}


def mesh_config(shape, **changes):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), shape, strict=True))
    return toy_config(**RUN | sizes | changes)


@pytest.fixture(scope="module")
def one_device(fast_runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    loop.fit(mesh_config((1, 1, 1)), workdir, "none")
    return workdir


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_mesh_learns_what_one_device_learns(shape, one_device, tmp_path):
    loop.fit(mesh_config(shape), tmp_path, "none")
    assert_same_run(tmp_path, one_device, 4, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_bytes_per_device(shape):
    """Kernels are split over fsdp and tensor, and moments are sharded like their parameters."""
    config = mesh_config(shape)
    mesh = sharding.make_mesh(config.mesh)
    bundle = placed_model(task_class(config.task)(config, mesh))
    schedule = optimizers.make_schedule(config.optimizer, 4, 0)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, bundle.trainable)
    created = placement.create_state(bundle, optimizer, mesh, ema=True, float16=False)
    fsdp, tensor = shape[1:]
    parts = {
        "tower/kernel": fsdp * tensor,
        "layers/kernel": fsdp * tensor,
        "head/kernel": tensor,
    }
    arrays = created.params | bundle.frozen
    assert {path: shards(leaf) for path, leaf in arrays.items()} == {path: parts.get(path, 1) for path in arrays}
    moments = [leaf for leaf in jax.tree.leaves(created.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(created.params)
    for path, leaf in created.params.items():
        same = [moment for moment in moments if moment.shape == leaf.shape]
        assert {moment.sharding for moment in same} == {leaf.sharding} == {created.ema[path].sharding}
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in created.params.values())
    assert on_one == 4 * (2 * 16 * 16 // (fsdp * tensor) + 2 * 16 + 16 // tensor + 1)


def shards(leaf) -> int:
    """Returns the number of parts of an array."""
    return leaf.size // math.prod(leaf.addressable_shards[0].data.shape)


def test_parameters_are_in_memory_once():
    config = mesh_config((1, 1, 1))
    mesh = sharding.make_mesh(config.mesh)
    bundle = placed_model(task_class(config.task)(config, mesh))
    before = {path: np.array(leaf) for path, leaf in bundle.trainable.items()}
    schedule = optimizers.make_schedule(config.optimizer, 4, 0)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, bundle.trainable)
    created = placement.create_state(bundle, optimizer, mesh, ema=False, float16=False)
    assert all(leaf.is_deleted() for leaf in bundle.trainable.values())
    for path, leaf in created.params.items():
        np.testing.assert_array_equal(leaf, before[path])


def test_an_indivisible_dimension_is_not_split_and_is_noted():
    config = mesh_config((1, 8, 1), model__width=12)
    mesh = sharding.make_mesh(config.mesh)
    bundle = placed_model(task_class(config.task)(config, mesh))
    assert bundle.notes == [
        "layers/kernel: dimension 1 of (2, 12, 12) is not divisible by 8 (fsdp), kept whole",
    ]
    assert shards(bundle.trainable["layers/kernel"]) == 1


def test_trainable_pattern_that_matches_nothing():
    config = mesh_config((1, 1, 1), model__trainable="layer/.*")
    mesh = sharding.make_mesh(config.mesh)
    with pytest.raises(
        UserError, match=r"trainable parameters: 'layer/\.\*' matches none of 6 paths \(nearest are lay"
    ):
        placed_model(task_class(config.task)(config, mesh))
