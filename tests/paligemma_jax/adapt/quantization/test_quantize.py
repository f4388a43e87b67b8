"""Quantised models: equal to the plain model of the same weights, trained, merged, and sharded."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.adapt.lora.adapter import TRAINABLE, attach_lora, largest_logit_gap, lora_projections, merge_lora
from paligemma_jax.adapt.quantization import quantize as quantization
from paligemma_jax.models.paligemma import PaliGemma, variant
from paligemma_jax.models.projection import projections
from paligemma_jax.tasks.common import SHARDING_RULES
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

ALL = r"decoder/layers/.*"

pytestmark = pytest.mark.usefixtures("fast_compilation")


def with_lora(model, targets=r"decoder/.*/(q_proj|down_proj)"):
    """Adapters that are not zero."""
    attach_lora(model, targets, rank=2, alpha=4, rngs=nnx.Rngs(0))
    for module in lora_projections(model).values():
        draw = np.random.default_rng(module.lora_b.size).standard_normal(module.lora_b.shape)
        module.lora_b[...] = jnp.asarray(0.1 * draw, jnp.float32)
    return model


def remat(model, kind):
    for tower in (model.vision, model.decoder):
        tower.config = dataclasses.replace(tower.config, remat=kind)
    return model


def loss_and_gradient(model, batch):
    """Logits' mean square at real tokens, and its gradient in the adapters; all else is frozen."""
    graph, arrays = param_tree.split(model)
    lora = {path: array for path, array in arrays.items() if re.fullmatch(TRAINABLE, path)}
    frozen = {path: array for path, array in arrays.items() if path not in lora}

    def loss(lora, frozen, batch):
        logits, _ = param_tree.merge(graph, lora | frozen)(**batch)
        return jnp.square(logits * batch["mask_input"][..., None]).mean()

    return jax.jit(jax.value_and_grad(loss))(lora, frozen, batch)


# The model.


@pytest.mark.parametrize("kind, double, checkpointing", [("nf4", True, "block"), ("int8", False, "none")])
def test_loss_and_adapter_gradients_equal_the_dequantised_model_s(
    small_model, small_batch, kind, double, checkpointing
):
    quantized = pg.quantize(nnx.clone(small_model), kind, double=double)
    plain = pg.dequantize(nnx.clone(quantized))
    assert quantization.is_quantized(quantized) and not quantization.is_quantized(plain)
    assert param_tree.abstract(plain) == param_tree.abstract(small_model)
    loss, grads = loss_and_gradient(remat(with_lora(quantized), checkpointing), small_batch)
    expected_loss, expected = loss_and_gradient(with_lora(plain), small_batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert set(grads) == set(expected) and len(grads) == 4
    for path, grad in grads.items():
        assert np.abs(grad).max() > 0
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=1e-4 * np.abs(expected[path]).max())


def test_paths_types_and_targets(small_model):
    model = pg.quantize(nnx.clone(small_model), "nf4", targets=ALL)
    before, after = param_tree.abstract(small_model), param_tree.abstract(model)
    quantized = {path for path in before if path not in after}
    assert quantized == {path for path in before if re.fullmatch(ALL + "/kernel", path)}
    stored = {path for path in after if re.fullmatch(quantization.FROZEN, path)}
    assert (
        stored == {f"{path}/{leaf}" for path in quantized for leaf in ("codes", "absmax")} == set(after) - set(before)
    )
    assert all(after[path] == before[path] for path in set(after) & set(before))
    # Width 32, 48 wide inside: half a block a row, so two rows a group; 16 rows of 24 bytes are 4 x 3 blocks.
    assert after["decoder/layers/mlp/gate_proj/kernel/codes"] == jax.ShapeDtypeStruct((2, 24, 32), jnp.uint8)
    assert after["decoder/layers/mlp/down_proj/kernel/absmax"] == jax.ShapeDtypeStruct((2, 8, 3), jnp.float32)
    everything = pg.quantize(nnx.clone(small_model), "int8")
    left = [path for path in param_tree.abstract(everything) if path.endswith("/kernel")]
    assert left == ["vision/patch_embedding/kernel"]


@pytest.mark.parametrize("kind, double", [("nf4", True), ("int8", False)])
def test_layers_quantised_one_by_one_are_the_stack(small_model, kind, double):
    """Quantises every layer as a loader does, from torch's layout."""
    model = param_tree.flatten(pg.quantize(nnx.clone(small_model), kind, double=double))
    for name, contracted in (("vision/layers/self_attn/out_proj", 2), ("decoder/layers/mlp/up_proj", 1)):
        kernel = np.asarray(param_tree.flatten(small_model)[f"{name}/kernel"])
        layers = [quantization.quantize_array(kind, layer, contracted, double=double) for layer in kernel]
        for leaf in layers[0]:
            np.testing.assert_array_equal(np.stack([layer[leaf] for layer in layers]), model[f"{name}/kernel/{leaf}"])


def test_3b_in_nf4_takes_the_bytes_that_its_shapes_say():
    config = variant("3b-224").replace(both=dict(dtype="bfloat16", param_dtype="bfloat16"))

    def make():
        return pg.quantize(PaliGemma(config, rngs=nnx.Rngs(0)), "nf4")

    leaves = param_tree.abstract(nnx.eval_shape(make))
    plain = param_tree.abstract(nnx.eval_shape(lambda: PaliGemma(config, rngs=nnx.Rngs(0))))
    weights = sum(leaf.size for path, leaf in plain.items() if re.fullmatch(f"({quantization.TARGETS})/kernel", path))
    nbytes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in leaves.items()}
    assert sum(size for path, size in nbytes.items() if re.fullmatch(quantization.FROZEN, path)) == weights * 9 / 16
    assert 2.2 < sum(nbytes.values()) / 2**30 < 2.3  # of 5.44 GiB in bfloat16
    # 4304 inputs are no multiple of 64: four rows are 269 blocks, and the outputs' axis can still be split.
    assert leaves["vision/layers/mlp/fc2/kernel/absmax"].shape == (27, 288, 269)


# Merging.


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_adds_to_the_very_weights_the_adapter_was_trained_on(small_model, kind):
    model = with_lora(pg.quantize(nnx.clone(small_model), kind))
    module = model.decoder.layers.mlp.down_proj
    expected = np.asarray(module.kernel.dequantize()) + np.asarray(module.low_rank_delta())
    merged = merge_lora(nnx.clone(model))
    np.testing.assert_array_equal(merged.decoder.layers.mlp.down_proj.kernel[...], expected)
    plain = [path for path in param_tree.abstract(merged) if re.fullmatch(r"decoder/.*/kernel", path)]
    assert plain == [f"decoder/layers/{path}/kernel" for path in ("mlp/down_proj", "self_attn/q_proj")]
    again = merge_lora(nnx.clone(model), requantize=True)
    assert param_tree.abstract(again) == param_tree.abstract(pg.quantize(nnx.clone(small_model), kind))
    kernel = again.decoder.layers.mlp.down_proj.kernel
    np.testing.assert_array_equal(kernel.codes[...][1], quantization.quantize_array(kind, expected[1], 1)["codes"])


def test_the_logit_gap_of_a_merge(small_model, small_batch):
    model = with_lora(pg.quantize(nnx.clone(small_model), "nf4"))
    merged, rounded = merge_lora(nnx.clone(model)), merge_lora(nnx.clone(model), requantize=True)
    gap, rounded_gap = (largest_logit_gap(model, other, **small_batch) for other in (merged, rounded))
    assert gap < 1e-4 and rounded_gap > 100 * gap
    logits = [np.asarray(each(**small_batch)[0])[np.asarray(small_batch["mask_input"])] for each in (model, rounded)]
    assert rounded_gap == pytest.approx(np.abs(logits[0] - logits[1]).max(), rel=1e-3)


# Evaluation of int8.


def test_outlier_split_is_switched_on_and_off(small_model, small_batch):
    model = pg.quantize(nnx.clone(small_model), "int8")
    split = quantization.set_outlier_split(nnx.clone(model), 6.0)
    assert {m.kernel.outlier_threshold for m in projections(split).values() if m.kernel.shape[0] == 2} == {6.0}
    gap = largest_logit_gap(model, split, **small_batch)
    assert 1e-4 < gap < 0.5  # inputs are rounded, to 1 part in 127 of their row's largest
    off = quantization.set_outlier_split(split, None)
    assert largest_logit_gap(model, off, **small_batch) == 0.0


# Sharding.


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sharded_like_the_base_and_equal_to_one_device(small_model, small_batch, kind):
    model = pg.quantize(nnx.clone(small_model), kind, targets=ALL)
    graph, arrays = param_tree.split(model)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    where, _ = sharding.shardings(mesh, quantization.SHARDING_RULES + SHARDING_RULES, arrays)
    placed = {path: jax.device_put(array, where[path]) for path, array in arrays.items()}
    for path, array in placed.items():
        if path.startswith("decoder/layers/") and path.endswith("/codes"):
            assert array.addressable_shards[0].data.nbytes == array.nbytes // 4, path

    def run(arrays, batch):
        return param_tree.merge(graph, arrays)(**batch)[0]

    batch = {name: jnp.concatenate([array] * 3)[:8] for name, array in small_batch.items()}
    rows = sharding.batch_sharding(mesh, accumulate=False)
    logits = jax.jit(run, out_shardings=rows)(placed, jax.device_put(batch, rows))
    np.testing.assert_allclose(logits, jax.jit(run)(arrays, batch), rtol=0, atol=1e-4)


# Refusals.


def test_refusals_are_one_sentence(small_model):
    with pytest.raises(UserError, match=r"quantize is 'fp4', expected one of nf4, int8, int4"):
        pg.quantize(small_model, "fp4")
    with pytest.raises(UserError, match=r"block size of nf4 is 32, expected 64 or 128"):
        pg.quantize(small_model, "nf4", block_size=32)
    with pytest.raises(UserError, match=r"double quantisation is set for int8, expected nf4"):
        pg.quantize(small_model, "int8", double=True)
    with pytest.raises(UserError, match=r"quantize targets: 'decoder/q' matches none"):
        pg.quantize(small_model, "nf4", targets="decoder/q")
    with pytest.raises(UserError, match=r"no int8 kernels"):
        quantization.set_outlier_split(small_model)
    model = pg.quantize(nnx.clone(small_model), "int8", targets=ALL)
    with pytest.raises(UserError, match=r"decoder/layers/mlp/down_proj is quantised already"):
        pg.quantize(model, "nf4", targets=ALL)
    with pytest.raises(UserError, match=r"outlier threshold is -1, expected a positive number or None"):
        quantization.set_outlier_split(model, -1)
