"""Rows pinned to devices and weights gathered, as seen in compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train_jax.core import param_tree, row_sharding
from train_jax.parallel import sharding
from train_jax.plan import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
ROWS, WIDTH = 16, 32


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MESH)


class Net(nnx.Module):
    """Two layers; the hidden one is split over "fsdp" and "tensor"."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.outputs = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(row_sharding.apply_block(self.hidden, x))
        return row_sharding.apply_block(self.outputs, h)


RULES = (("hidden/kernel", ("fsdp", "tensor")), ("outputs/kernel", ("tensor", "fsdp")), (".*", ()))


def placed(mesh):
    """The model's graph, its arrays on the mesh, and rows on it."""
    model = Net()
    places, _ = sharding.shardings(mesh, RULES, param_tree.abstract(model))
    graph, arrays = param_tree.split(row_sharding.mark(model, places))
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return graph, jax.device_put(arrays, places), jax.device_put(x, sharding.batch_sharding(mesh, accumulate=False))


def loss(graph, arrays, x):
    return jnp.square(param_tree.merge(graph, arrays)(x)).sum()


def exchanged(compiled) -> set[tuple[str, tuple[int, ...]]]:
    result = hlo.collectives(hlo.parse(compiled.as_text()))
    return {(kind, shape) for kind, type_ in result for shape in hlo.shapes(type_)}


def test_values_and_gradients_are_those_of_one_device_and_no_activation_is_exchanged(mesh):
    graph, arrays, x = placed(mesh)
    step = jax.jit(row_sharding.with_mesh(mesh, jax.value_and_grad(lambda arrays, x: loss(graph, arrays, x))))
    value, gradients = step(arrays, x)
    plain = jax.device_put((arrays, x), jax.devices()[0])
    expected = jax.jit(jax.value_and_grad(lambda arrays, x: loss(graph, arrays, x)))(*plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), (value, gradients), expected)
    shapes = {shape for _, shape in exchanged(step.lower(arrays, x).compile())}
    assert shapes <= {(), *(array.shape for array in arrays.values())}


def test_without_a_mesh_arrays_are_returned_unchanged(mesh):
    graph, arrays, x = placed(mesh)
    assert row_sharding.row_parts(ROWS) == 1 and row_sharding.pin_rows(x) is x
    jaxpr = jax.make_jaxpr(lambda arrays, x: loss(graph, arrays, x))(arrays, x)
    assert "sharding_constraint" not in str(jaxpr) and "remat" not in str(jaxpr)


def test_rows_that_the_mesh_does_not_divide_are_not_pinned(mesh):
    with row_sharding.use_mesh(mesh):
        assert row_sharding.row_parts(16) == 8 and row_sharding.row_parts(12) == 1
        pinned = jax.make_jaxpr(row_sharding.pin_rows)
        assert "sharding_constraint" in str(pinned(jnp.zeros((16, 3))))
        assert "sharding_constraint" not in str(pinned(jnp.zeros((12, 3))))


def test_rows_may_be_on_another_axis(mesh):
    pin = row_sharding.with_mesh(mesh, lambda tree: row_sharding.pin_rows(tree, (0, 1)))
    x = jax.device_put(np.zeros((16, 8)), NamedSharding(mesh, P()))
    first, (second, nothing) = jax.jit(pin)((x, (x, None)))
    assert first.sharding.spec == P(("data", "fsdp")) and second.sharding.spec == P(None, ("data", "fsdp"))
    assert nothing is None


def test_gathered_weights_stay_split_over_other_axes():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    graph, arrays, _ = placed(mesh)
    gather = lambda arrays: param_tree.flatten(row_sharding.gather(param_tree.merge(graph, arrays)))  # noqa: E731
    result = jax.jit(row_sharding.with_mesh(mesh, gather))(arrays)
    assert result["hidden/kernel"].sharding.spec == P(None, "tensor")
    assert result["outputs/kernel"].sharding.shard_shape((2 * WIDTH, WIDTH)) == (WIDTH, WIDTH)
    np.testing.assert_array_equal(result["hidden/kernel"], arrays["hidden/kernel"])


def test_a_function_by_rows(mesh):
    """Rows keep their order, and sums are over all rows."""

    def function(x, scale):
        return scale * x, {"total": (scale * x).sum()}

    by_rows = row_sharding.by_rows(function, (True, False), (True, {"total": False}))
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    place = NamedSharding(mesh, P())
    rows, sums = jax.jit(row_sharding.with_mesh(mesh, by_rows))(*jax.device_put((x, np.float32(3)), place))
    np.testing.assert_array_equal(rows, 3 * x)
    np.testing.assert_allclose(sums["total"], 3 * x.sum())
    few = jax.jit(row_sharding.with_mesh(mesh, by_rows))(*jax.device_put((x[:3], np.float32(3)), place))
    np.testing.assert_allclose(few[1]["total"], 3 * x[:3].sum())


def test_a_function_by_rows_of_a_tree(mesh):
    by_rows = row_sharding.by_rows(lambda tree, scale: {"sorted": jnp.sort(scale * tree["x"])}, (True, False), True)
    x = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    place = sharding.batch_sharding(mesh, accumulate=False)
    run = jax.jit(row_sharding.with_mesh(mesh, by_rows))
    arguments = {"x": jax.device_put(x, place)}, jax.device_put(np.float32(-1), NamedSharding(mesh, P()))
    np.testing.assert_array_equal(run(*arguments)["sorted"], np.sort(-x))
    assert not exchanged(run.lower(*arguments).compile())
