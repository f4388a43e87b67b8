"""The training step of a real model: the same whatever the devices and the micro-batch; near float32 in half."""

import math

import jax
import numpy as np
import pytest

from paligemma_jax.models.projection import projections
from tests.paligemma_jax.training import SMOOTH, Training, largest_change, long_answers

pytestmark = pytest.mark.usefixtures("fast_compilation")

EVERYTHING = {"cache_features": False, "model.unroll": False, "adapter.targets": ".*", "adapter.dropout": 0.1}
MESHES = {
    "8x1x1": {"mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1},
    "1x8x1": {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1},
    "2x2x2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}


@pytest.fixture(scope="module")
def options(mini_options):
    return mini_options | SMOOTH | EVERYTHING | {"data.suffix_length": 8}


# Meshes.


@pytest.fixture(scope="module")
def one_device(options):
    """Means and adapters of two steps on one device."""
    training = Training(options, long_answers())
    start = training.trained()
    means = training.run(2)
    return means, training.trained(), start


@pytest.fixture(scope="module", params=MESHES)
def on_mesh(options, request):
    """The same two steps on eight devices, with the placement before the first (its arrays are donated)."""
    training = Training(options | MESHES[request.param], long_answers())
    return request.param, training, training.run(2)


def test_two_steps_on_a_mesh_equal_one_device(on_mesh, one_device):
    _, training, means = on_mesh
    expected, trained, start = one_device
    for result, reference in zip(means, expected, strict=True):
        assert result["good_rows"] == reference["good_rows"]
        np.testing.assert_allclose(result["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], reference["grad_norm"], rtol=1e-4)
    assert {path.split("/")[0] for path in trained} == {"vision", "projector", "decoder"}
    assert all(not np.array_equal(array, start[path]) for path, array in trained.items())  # both halves moved
    for path, array in training.trained().items():
        np.testing.assert_allclose(array, trained[path], rtol=1e-3, atol=2e-5, err_msg=path)


def shard_bytes(array: jax.Array) -> int:
    """Bytes of one array on each device, the same on all."""
    (size,) = {shard.data.nbytes for shard in array.addressable_shards}
    assert len(array.addressable_shards) == 8
    return size


def kernel_parts(mesh: str, path: str) -> int:
    """Into how many parts the kernel of a module is cut."""
    if mesh == "8x1x1" or "patch" in path:
        return 1
    if path == "projector/linear":
        return 8 if mesh == "1x8x1" else 2
    if mesh == "2x2x2" and path.startswith("decoder/") and path.endswith(("k_proj", "v_proj")):
        return 2  # a single key/value head cannot be cut over "tensor"
    return 8 if mesh == "1x8x1" else 4


def test_base_bytes_on_each_device(on_mesh):
    mesh, training, _ = on_mesh
    frozen = training.placed.frozen
    modules = projections(training.placed.model(training.state.params))
    assert len(modules) == 15
    for path in modules:
        kernel = frozen[f"{path}/kernel"]
        assert shard_bytes(kernel) * kernel_parts(mesh, path) == kernel.nbytes, path
    embedding = frozen["decoder/embed_tokens/embedding"]
    parts = {"8x1x1": 1, "1x8x1": 8, "2x2x2": 4}[mesh]
    assert embedding.nbytes == 4 * 1792 * 32 and shard_bytes(embedding) == embedding.nbytes // parts


def test_adapters_are_sharded_like_their_base(on_mesh):
    """The inputs of A as those of the kernel, the outputs of B as those of the kernel, the rank never."""
    _, training, _ = on_mesh
    arrays, frozen = training.state.params, training.placed.frozen
    for path, module in projections(training.placed.model(arrays)).items():
        kernel = frozen[f"{path}/kernel"]
        cut = kernel.sharding.shard_shape(kernel.shape)
        stack = len(cut) - len(module.in_shape) - len(module.out_shape)
        inputs, outputs = cut[stack : stack + len(module.in_shape)], cut[stack + len(module.in_shape) :]
        for half, shape in (("a", (*inputs, 8)), ("b", (8, *outputs))):
            adapter = arrays[f"{path}/lora_{half}"]
            assert adapter.sharding.shard_shape(adapter.shape) == (*cut[:stack], *shape), f"{path}/lora_{half}"
            assert shard_bytes(adapter) == 4 * math.prod((*cut[:stack], *shape))


def test_moments_are_sharded_like_their_parameters(on_mesh):
    """Two float32 moments an adapter, none for the base; after a step they are still in their places."""
    _, training, _ = on_mesh
    moments = [leaf for leaf in jax.tree.leaves(training.state.opt_state) if leaf.ndim > 0]
    arrays = training.state.params
    assert sum(map(shard_bytes, moments)) == 2 * sum(map(shard_bytes, arrays.values()))
    assert sum(leaf.nbytes for leaf in moments) == 2 * sum(leaf.nbytes for leaf in arrays.values())


# Accumulation.


@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_four_micro_batches_of_eight_equal_a_batch_of_32(options, reduction):
    changes = {"adapter.targets": "decoder/.*", "batch_size": 32, "loss.reduction": reduction}
    whole = Training(options | changes, long_answers())
    parts = Training(options | changes | {"micro_batch": 8}, long_answers())
    start = whole.trained()
    expected, means = whole.run(2), parts.run(2)
    batch = parts.batch(0)
    tokens = (batch["mask_loss"] * batch["weight"][..., None]).sum((1, 2))
    assert batch["tokens"].shape[:2] == (4, 8) and len(set(tokens.tolist())) > 1  # a mean of means would differ
    for one, other in zip(means, expected, strict=True):
        np.testing.assert_allclose([one["loss"], one["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-5)
    assert largest_change(whole.trained(), start) > 0.01
    for path, array in parts.trained().items():
        np.testing.assert_allclose(array, whole.trained()[path], rtol=1e-3, atol=1e-5, err_msg=path)


def test_flash_attention_in_micro_batches_on_a_mesh_is_plain_attention(options, one_device):
    """Rows over two axes, heads over the third; the kernel runs in an interpreter."""
    expected, trained, _ = one_device
    changes = {"model.attention": "flash", "model.remat": "block", "micro_batch": 4, **MESHES["2x2x2"]}
    training = Training(options | changes, long_answers())
    for result, reference in zip(training.run(2), expected, strict=True):
        np.testing.assert_allclose(result["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], reference["grad_norm"], rtol=1e-4)
    for path, array in training.trained().items():
        np.testing.assert_allclose(array, trained[path], rtol=1e-3, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("remat", ["mlp", "auto"])
def test_two_steps_do_not_depend_on_what_is_recomputed(options, one_device, remat):
    """Against "none", with dropout and with adapters in both towers."""
    expected, trained, _ = one_device
    training = Training(options | {"model.remat": remat}, long_answers())
    for result, reference in zip(training.run(2), expected, strict=True):
        np.testing.assert_allclose(result["loss"], reference["loss"], rtol=1e-6)
        np.testing.assert_allclose(result["grad_norm"], reference["grad_norm"], rtol=1e-5)
    for path, array in training.trained().items():
        np.testing.assert_allclose(array, trained[path], rtol=1e-4, atol=2e-6, err_msg=path)


# Half precision.


@pytest.fixture(scope="module")
def losses_of(options):
    """Losses of five steps in some dtype, and the training after them."""

    def losses(dtype):
        training = Training(options | {"compute_dtype": dtype, "optimizer.learning_rate": 0.01}, long_answers())
        return [means["loss"] for means in training.run(5)], training

    return losses


@pytest.fixture(scope="module")
def float32_losses(losses_of):
    return losses_of("float32")[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_five_steps_in_half_precision(losses_of, float32_losses, dtype, tolerance):
    losses, training = losses_of(dtype)
    guard = jax.device_get(training.state.guard)
    assert guard.total == 0 and guard.scale_skips == 0 and training.state.updates == 5
    assert {leaf.dtype.name for leaf in training.state.params.values()} == {"float32"}
    assert training.placed.frozen["decoder/embed_tokens/embedding"].dtype == dtype
    np.testing.assert_allclose(losses, float32_losses, rtol=tolerance)
    assert losses != float32_losses  # it did compute in another precision
    assert float32_losses[-1] < float32_losses[0] - 0.05
