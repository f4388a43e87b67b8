import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from train_jax.core.errors import UserError
from train_jax.parallel import sharding


def sizes(data=-1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.fixture(autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "the tests run on 8 fake devices: see conftest.py"


@pytest.mark.parametrize(
    "asked, devices, expected",
    [
        (sizes(), 1, (1, 1, 1)),
        (sizes(), 8, (8, 1, 1)),
        (sizes(tensor=2), 8, (4, 1, 2)),
        (sizes(2, -1, 2), 8, (2, 2, 2)),
        (sizes(1), 8, (1, 1, 1)),
        (sizes(2, 2, 1), 8, (2, 2, 1)),
    ],
)
def test_mesh_shape(asked, devices, expected):
    assert tuple(sharding.mesh_shape(asked, devices).values()) == expected


@pytest.mark.parametrize(
    "asked, devices, processes, sentence",
    [
        (sizes(4), 2, 1, "needs 4 devices and there are 2, expected at most that many: change config.mesh"),
        (sizes(1), 2, 2, "needs 1 devices and there are 2, expected exactly that many"),
        (sizes(tensor=3), 8, 1, "-1 cannot be resolved because 3 does not divide 8"),
        (sizes(-1, -1), 8, 1, "expected positive sizes and at most one -1"),
        (sizes(0), 8, 1, "expected positive sizes and at most one -1"),
        (sizes(1, 1, -1), 8, 2, "data x fsdp = 1 is not a multiple of the 2 processes"),
    ],
)
def test_impossible_meshes_are_refused(asked, devices, processes, sentence):
    with pytest.raises(UserError, match=sentence):
        sharding.mesh_shape(asked, devices, processes)


def test_mesh_axes_are_auto():
    mesh = sharding.make_mesh(sizes(2, 2, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [device.id for device in mesh.devices.ravel()] == sorted(device.id for device in jax.devices())


TREE = {
    "decoder/q_proj/kernel": jax.ShapeDtypeStruct((3, 8, 4), np.float32),
    "decoder/q_proj/bias": jax.ShapeDtypeStruct((6,), np.float32),
    "scale": jax.ShapeDtypeStruct((), np.float32),
}


def test_rules_split_dimensions():
    mesh = sharding.make_mesh(sizes(2, 2, 2))
    rules = [(".*/kernel", (None, ("data", "fsdp"), "tensor")), (".*/bias", ("tensor",)), (".*", ()), ("x/.*", ())]
    chosen, notes = sharding.shardings(mesh, rules, TREE)
    assert notes == []
    assert {path: rule.shard_shape(TREE[path].shape) for path, rule in chosen.items()} == {
        "decoder/q_proj/kernel": (3, 2, 2),
        "decoder/q_proj/bias": (3,),
        "scale": (),
    }


def test_device_bytes_of_a_sharded_parameter():
    mesh = sharding.make_mesh(sizes(1, 8, 1))
    chosen, _ = sharding.shardings(mesh, [(".*", ("fsdp", None))], {"w": np.zeros((16, 4), np.float32)})
    array = jax.device_put(np.arange(64, dtype=np.float32).reshape(16, 4), chosen["w"])
    assert [shard.data.nbytes for shard in array.addressable_shards] == [16 * 4 * 4 // 8] * 8
    whole = jax.device_put(array, sharding.replicated(mesh))
    assert [shard.data.nbytes for shard in whole.addressable_shards] == [16 * 4 * 4] * 8


def test_an_indivisible_dimension_is_not_split_and_is_noted():
    mesh = sharding.make_mesh(sizes(2, 1, 4))
    rules = [(".*/kernel", (None, None, "tensor")), (".*/bias", ("tensor",)), (".*", ())]
    chosen, notes = sharding.shardings(mesh, rules, TREE)
    assert chosen["decoder/q_proj/bias"].is_fully_replicated
    assert not chosen["decoder/q_proj/kernel"].is_fully_replicated
    assert notes == ["decoder/q_proj/bias: dimension 0 of (6,) is not divisible by 4 (tensor), kept whole"]


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ([("decoder/.*", ())], "no rule matches scale"),
        ([(".*/kernel", ("fsdp",)), (".*", ())], r"has 1 entries for shape \(3, 8, 4\), expected 3 or none"),
        ([(".*/bias", ("tensr",)), (".*", ())], "names the axis 'tensr', .*; did you mean 'tensor'"),
    ],
)
def test_impossible_rules_are_refused(rules, sentence):
    with pytest.raises(UserError, match=sentence):
        sharding.shardings(sharding.make_mesh(sizes()), rules, TREE)


def test_local_rows_partition_the_batch():
    parts = [sharding.local_rows(p, 4, 12) for p in range(4)]
    assert np.concatenate([np.arange(12)[part] for part in parts]).tolist() == list(range(12))
    with pytest.raises(UserError, match="a batch of 10 does not divide over 4 processes"):
        sharding.local_rows(0, 4, 10)


@pytest.mark.parametrize("accumulate, shape, shard", [(True, (2, 8, 3), (2, 2, 3)), (False, (8, 3), (2, 3))])
def test_batches_split_over_data_and_fsdp(accumulate, shape, shard):
    mesh = sharding.make_mesh(sizes(2, 2, 2))
    batch = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    spec = sharding.batch_sharding(mesh, accumulate).spec
    assert spec == PartitionSpec(*[None] * accumulate, ("data", "fsdp"))
    array = sharding.to_global(batch, mesh, spec)["x"]
    assert array.shape == shape and array.addressable_shards[0].data.shape == shard
    assert (np.asarray(array) == batch["x"]).all()
